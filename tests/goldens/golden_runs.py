"""The runs whose results are recorded in ``recorded/``: small, deterministic, and by way of the package's public names.

Every result is a :data:`Result` by name. Everything here that depends on a name inside the package, a key of a file or an
option of a command stands in one place: rename it there.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import platform
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from cases import METHODS, PROBLEMS, MethodCase, Problem, TiedLM, named, optimizer_for, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import l2l
from l2l import cli
from l2l.train.runlog import read_run_log
from l2l.tuners.features import RunStatistics

Result: TypeAlias = dict[str, Any]
"""``bits``: hashes of floating-point results, equal on the machine type that recorded them; ``numbers``: lists of floats,
the same results for other machines; ``exact``: what holds on every machine."""

Compute: TypeAlias = Callable[[Path], Result]

RECORDED = Path(__file__).parent / "recorded"
PRINTED = RECORDED / "print_config"
STEPS = 5


# Hashes and numbers


def machine() -> dict[str, str]:
    """What the kernels' rounding depends on: processor, instruction set in use, torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    processor = {key.strip(): value.strip() for key, value in known.items()}
    fields = ("model name", "cpu family", "model")
    return {
        "processor": " ".join(processor[name] for name in fields if name in processor) or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def digest(data: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def tensor_bits(tensor: Tensor) -> str:
    return digest(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def tensors_bits(tensors: Iterable[Tensor]) -> str:
    """Of all tensors together, whatever their names and order: both may change without a change of results."""
    return digest("".join(sorted(map(tensor_bits, tensors))).encode())


def numbers_bits(values: Sequence[float]) -> str:
    return digest(struct.pack(f"<{len(values)}d", *values))


def rounded(values: Iterable[float]) -> list[float]:
    """To six significant digits."""
    return [float(f"{value:.6g}") for value in values]


def columns_result(columns: Mapping[str, Sequence[float]], exact: Mapping[str, Any]) -> Result:
    return {
        "bits": {name: numbers_bits(values) for name, values in columns.items()},
        "numbers": {name: rounded(values) for name, values in columns.items()},
        "exact": dict(exact),
    }


def moved_result(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Result:
    """Hash of the weights; of each tensor how far it moved (2-norm)."""
    moved = [(after[name].double() - before[name].double()).norm().item() for name in before]
    return {"bits": {"weights": tensors_bits(after.values())}, "numbers": {"moved": rounded(moved)}}


# (a) Weights after a few steps: contract cases, and the optimizers of the public face


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    before = weights(model)
    for _ in range(STEPS):
        optimizer.step(model)
    return moved_result(before, weights(model))


class HalfLM(TiedLM):
    """In bfloat16 with its loss in float32, as closures give it: one in bfloat16 is the same on both sides of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self) -> Tensor:
        x = self.embed(self.tokens)
        logits = self.head(self.norm(x + self.attention(x))).float()
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())


def contract_weights(case: MethodCase, problem: Problem) -> Result:
    model = problem.make()
    return stepped(model, optimizer_for(case, model, problem))


def contracts() -> dict[str, Compute]:
    """Every method of the contracts on every problem in float32, and on the language model in bfloat16."""
    problems = [*PROBLEMS, replace(PROBLEMS[-1], name="tied_lm bfloat16", make=HalfLM)]
    return {
        f"{problem.name} {named(case)}": lambda _, c=case, p=problem: contract_weights(c, p)
        for problem in problems
        for case in METHODS
    }


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "MeZO": lambda model: l2l.MeZO(model, lr=0.01, epsilon=1e-3, seed=3),
    "DiZO": lambda model: l2l.DiZO(model, lr=0.01, epsilon=1e-3, seed=3, interval=2, iterations=2),
    "ZOFineTuner": lambda model: l2l.ZOFineTuner(model, l2l.Tuner.for_model(model, seed=5), lr=0.01, epsilon=1e-3, seed=3),
}


def optimizer_weights(name: str) -> Result:
    model = TiedLM()
    return stepped(model, OPTIMIZERS[name](model))


# (b) Fine-tuning runs


def command(*words: str) -> str:
    """What the command printed; it must succeed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(words)
    if code != 0:
        raise RuntimeError(f"l2l {' '.join(words)} ended with {code}")
    return printed.getvalue()


def flags(options: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


FINE_TUNE: dict[str, Any] = {
    "model": "l2l/tiny",
    "task": "world_topic",
    "lr": 1e-4,
    "steps": 6,
    "batch_size": 4,
    "train_size": 24,
    "dev_size": 8,
    "test_size": 8,
    "eval_every": 3,
    "log_every": 1,
    "progress": False,
}

RUNS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "mezo lr=auto": {"lr": "auto", "curvature_every": 2},
    "mezo functional cosine": {"perturb": "functional", "schedule": "cosine", "seed": 4},
    "mezo bfloat16": {"dtype": "bfloat16"},
    "mezo lora": {"scheme": "lora", "lr": 1e-3},
    "dizo": {"method": "dizo", "method_args": {"interval": 3, "iterations": 2}},
    "learned": {"method": "learned", "tuner": "l2l-tiny"},
    "learned lr=auto": {"method": "learned", "tuner": "l2l-tiny-ratio", "lr": "auto", "curvature_every": 2},
    "learned+lozo": {"method": "learned+lozo", "tuner": "l2l-tiny"},
    "sparse+mezo": {"method": "sparse+mezo"},
    "blockwise+mezo": {"method": "blockwise+mezo", "method_args": {"blockwise": {"level": "block", "groups": 2}}},
    "hybrid+mezo": {"method": "hybrid+mezo", "method_args": {"hybrid": {"match": "layers.3"}}},
    "fzoo": {"method": "fzoo", "lr": 1e-3},
    "lozo": {"method": "lozo"},
    "subzero": {"method": "subzero"},
    "tezo": {"method": "tezo"},
    "adam": {"method": "adam", "lr": 1e-3},
    "momentum": {"method": "momentum"},
    "hizoo": {"method": "hizoo"},
    "svrg": {"method": "svrg"},
    "sign": {"method": "sign", "lr": 1e-3},
    "adamw": {"method": "adamw", "lr": 1e-3},
}
"""Options beside :data:`FINE_TUNE`: one run per family of methods, and the other ways to step."""


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log_columns(path: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The head of a run's log, and its columns: a value per step, or per direction of every step."""
    header, lines = read_run_log(path)
    head = {name: header[name] for name in ("seed", "epsilon", "method", "tuner")}
    directions = [each for line in lines for each in line["directions"]]
    columns = {
        "lr": [line["lr"] for line in lines],
        "projected_gradient": [each[0] for each in directions],
        "loss_plus": [each[1] for each in directions],
        "loss_minus": [each[2] for each in directions],
        "loss": [line["loss"] for line in lines if "loss" in line],
        "curvature": [line["curvature"] for line in lines if "curvature" in line],
    }
    exact = {"head": head, "steps": [line["step"] for line in lines], "passes": [line["passes"] for line in lines]}
    return exact, {name: [float(v) for v in values if v is not None] for name, values in columns.items() if values}


def fine_tune(options: Mapping[str, Any], out: Path) -> Result:
    command("fine-tune", *flags({**FINE_TUNE, **options, "out": str(out)}))
    summary = json.loads((out / "summary.json").read_text())
    exact, columns = log_columns(out)
    columns["initial_loss, final_loss"] = [summary["initial_loss"], summary["final_loss"]]
    columns["dev losses"] = [float(row["dev_loss"]) for row in table(out / "metrics.csv") if row["dev_loss"]]
    result = columns_result(columns, exact | {"total passes": summary["passes"]})
    tensors = [tensor for path in (out / "model").glob("*.safetensors") for tensor in load_file(path).values()]
    result["bits"]["weights"] = tensors_bits(tensors)
    return result


# (c) Meta-training


META_TRAIN: dict[str, Any] = {
    "model": "l2l/tiny",
    "tasks": "world_topic,world_sentiment",
    "validation_tasks": "world_season",
    "steps": 10,
    "batch_size": 4,
    "train_size": 24,
    "dev_size": 8,
    "lr": 1e-4,
    "restart_every": 5,
    "validate_every": 5,
    "validation_steps": 4,
    "log_every": 1,
    "progress": False,
}

META_RUNS: dict[str, dict[str, Any]] = {
    "published": {},
    "ratio": {
        "objective": "log_progress_rate",
        "objective_args": {"decay": 0.8},
        "architecture": "table",
        "outer_optimizer": "adam",
        "outer_lr": 0.03,
        "validation_tasks": "",  # so that the last tuner is kept, not the best one, which is the first here
    },
}


def meta_train(options: Mapping[str, Any], out: Path) -> Result:
    command("meta-train", *flags({**META_TRAIN, **options, "out": str(out)}))
    summary = json.loads((out / "summary.json").read_text())
    rows = table(out / "metrics.csv")
    columns = {
        "train_loss": [float(row["train_loss"]) for row in rows if row["train_loss"]],
        "objective": [float(row["objective"]) for row in rows if row["objective"]],
    }
    if summary["validated"]:
        columns["validations"] = [loss for _, loss in summary["validations"]]
        columns["validation_loss, of MeZO"] = [summary["validation_loss"], summary["validation_loss_mezo"]]
    exact = {"validated": summary["validated"], "blocks": summary["blocks"]}
    result = columns_result(columns, exact)
    tensors = load_file(out / "tuner.safetensors")
    result["bits"]["tuner"] = tensors_bits(tensors.values())
    result["numbers"]["norm of the tuner"] = rounded(
        [sum(value.double().square().sum().item() for value in tensors.values()) ** 0.5]
    )
    return result


# (d) Sigma of the bundled tuners


BUNDLED = ("l2l-tiny", "l2l-tiny-ratio", "stories260K", "bitnet-tinystories-1M")


class StandIn(nn.Module):
    """Parameters of a tuner's blocks, by name, shape and kind, in place of a model that is not in the package."""

    def __init__(self, blocks: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(11)
        for block in blocks:
            values = nn.Parameter(0.02 * torch.randn(*block["shape"], generator=draw))
            *path, last = block["name"].split(".")
            at: nn.Module = self
            for i, part in enumerate(path):
                if not hasattr(at, part):
                    embedding = i == len(path) - 1 and "embed" in part
                    at.add_module(part, nn.Embedding(*block["shape"]) if embedding else nn.Module())
                at = getattr(at, part)
            setattr(at, last, values)

    def forward(self) -> Tensor:
        return torch.stack([(p.float() - 0.01).square().sum() for p in self.parameters()]).sum()


def blocks_of(name: str) -> list[dict[str, Any]]:
    """The blocks that the tuner's file names."""
    return json.loads((Path(__file__).parents[2] / "pretrained_tuners" / name / "config.json").read_text())["blocks"]


def sigma_per_block(name: str) -> tuple[Tensor, list[float]]:
    """Sigma [losses x blocks] before normalisation on fixed histories, and the normaliser's factor for each."""
    tuner = l2l.Tuner.from_pretrained(name)
    names = tuner.fingerprint.names
    last = torch.linspace(0.5, 2.0, len(names))
    mean = torch.linspace(-0.01, 0.02, len(names), dtype=torch.float64)
    moments = torch.stack([mean, torch.linspace(1e-4, 1e-2, len(names), dtype=torch.float64)], dim=1)
    found, factors = [], []
    for loss in (0.0, 0.7, 5.0):
        with torch.no_grad():
            scales = tuner.scales(tuner.features(RunStatistics(last, moments, loss, 0.9 * loss)), names)
        found.append(scales)
        factors.append(tuner.factor(scales, tuner.fingerprint.blocks()))
    return torch.stack(found), factors


def tuner_sigma(name: str) -> Result:
    """Sigma by itself, and the weights of a stand-in model that an optimizer moved with it."""
    sigma, factors = sigma_per_block(name)
    model = StandIn(blocks_of(name))
    tuner = l2l.Tuner.from_pretrained(name)
    result = stepped(model, l2l.ZOFineTuner(model, tuner, lr=1e-6, epsilon=1e-3, seed=2))
    result["bits"] |= {"sigma": tensor_bits(sigma), "factor": numbers_bits(factors)}
    result["numbers"] |= {"sigma at loss 0.7": rounded(sigma[1].flatten().tolist()), "factor": rounded(factors)}
    return result


# (e) A cell of a comparison, and a pair of an evaluation of tuners


EXPERIMENT: dict[str, Any] = {
    "settings": [{"name": "l2l-tiny", "tasks": ["world_stars"], "batch_size": 4}],
    "grid": [1e-4],
    "step_fraction_grid": [0.1],
    "passes": 8,
    "seeds": 1,
    "train_size": 32,
    "dev_size": 8,
    "test_size": 8,
    "evaluations": 1,
    "processes": 1,
    "progress": False,
}
FIGURES = ("lr", "initial_loss", "train_loss", "dev_loss", "test_loss", "accuracy", "best_dev_loss", "best_accuracy")
"""Of a run in a table: neither times nor memory nor places."""


def run_columns(rows: Iterable[Mapping[str, Any]], label: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Figures of the runs of a table, and what they are the figures of."""
    columns, exact = {}, {}
    for row in rows:
        columns |= {f"{row[label]}.{name}": [float(row[name])] for name in FIGURES if row.get(name) not in ("", None)}
        exact[row[label]] = {name: int(row[name]) for name in ("seed", "passes", "steps")} | {"task": row["task"]}
    return columns, exact


def compare_cell(out: Path) -> Result:
    methods = ["mezo", {"method": "fzoo", "scale": 10}]
    command("compare", *flags({**EXPERIMENT, "methods": methods, "out": str(out)}))
    return columns_result(*run_columns(table(out / "results.csv"), "label"))


def plain(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested JSON, by path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from plain(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from plain(inner, f"{name}.{i}")
    elif isinstance(value, int | float):
        yield name, float(value)


def meta_evaluate_pair(out: Path) -> Result:
    contenders = [
        {"label": "MeZO", "method": "mezo", "role": "baseline-mezo"},
        {"label": "tuner", "method": "learned", "tuner": "l2l-tiny", "options": {"lr": "auto"}},
    ]
    command("meta-evaluate", *flags({**EXPERIMENT, "contenders": contenders, "controls": [], "out": str(out)}))
    written = json.loads((out / "meta_evaluate.json").read_text())
    verdict = {name: value for name, value in written.items() if isinstance(value, int | float)}
    figures = {"win_matrix": written["win_matrix"]["row_beats_column"], "pairs": written["pairs"], **verdict}
    rows = [{**row, "lr": None if row.get("lr") == "auto" else row.get("lr")} for row in written["runs"]]
    columns, exact = run_columns(rows, "contender")
    return columns_result(columns | {name: [value] for name, value in plain(figures)}, exact)


# (f) The configuration that each command prints


COMMANDS: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "meta-train": (),
    "fine-tune": (),
    "lr-probe": (),
    "meta-evaluate": (),
    "compare": (),
    "plan": (),
    "evaluate": (),
    "bench": (),
    "estimate": (),
    "doctor": (),
    "tuners list": (),
    "tuners show": ("TUNER",),
    "tuners verify": ("TUNER",),
    "tuners card": ("TUNER",),
    "tuners diff": ("FIRST", "SECOND"),
    "tuners test": ("TUNER",),
    "tuners import": ("FILE",),
    "tuners download": ("TUNER",),
    "tuners push": ("TUNER", "REPO_ID"),
    "tasks list": (),
    "tasks show": ("TASK",),
    "tasks check": ("TASK",),
    "methods list": (),
}
"""Every command, and what stands for the arguments that it needs."""


def printed_config(name: str) -> str:
    """What ``l2l NAME --print_config`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*name.split(), *COMMANDS[name], "--print_config"])
    return printed.getvalue()


def printed_path(name: str) -> Path:
    return PRINTED / f"{name.replace(' ', '-')}.txt"


RECORDINGS: dict[str, dict[str, Compute]] = {
    "weights": contracts(),
    "optimizers": {name: lambda _, n=name: optimizer_weights(n) for name in OPTIMIZERS},
    "fine_tune": {name: lambda out, o=options: fine_tune(o, out) for name, options in RUNS.items()},
    "meta_train": {name: lambda out, o=options: meta_train(o, out) for name, options in META_RUNS.items()},
    "sigma": {name: lambda _, n=name: tuner_sigma(n) for name in BUNDLED},
    "experiments": {"compare": compare_cell, "meta-evaluate": meta_evaluate_pair},
}
"""By the name of the file in ``recorded/``, then of the result: what computes it, given a directory to be made."""
