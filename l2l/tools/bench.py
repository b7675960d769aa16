"""What a benchmark is told: the fields of ``l2l bench``.

What a measurement was made on.

Models to measure on: named shapes with random weights, built where they will run, or real ones.

The textbook step: four passes over the weights, each with noise drawn anew from a reset seed.

Malladi et al. 2023, arXiv:2305.17333, Algorithm 1. Every tensor of noise is materialised and every pass makes a new
tensor of weights, in the dtype of the weights: in bfloat16 this drifts and loses most of an update. Kept for
comparison only.

What is measured: each a context in which a step can be done again and again, and which leaves nothing behind.

Alternating measurement: in every round each contender is timed once, so that a slow minute slows all of them.

Figures of a benchmark as rows for the terminal and as Markdown.

``l2l bench``: build, warm up, take turns, and say what a step costs.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2l.estimators.finite_difference import Closure, finite_loss, two_point
from l2l.methods.base import FirstOrder, Method, check_counts
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.models.load import DTYPES, context_length, load_model
from l2l.models.shapes import SHAPES, shape_config
from l2l.noise import Key, NoiseTerm, TensorSlice, active_backend, add_noise, standard_deviation
from l2l.optim import ZOOptimizer
from l2l.params import Direction
from l2l.params.blocks import Block, Blocks
from l2l.report.console import progress_bar
from l2l.report.files import write_json
from l2l.report.memory import PeakMemory, current_bytes
from l2l.report.run_directory import RunDirectory, environment
from l2l.tuners.api import Tuner


@dataclass(frozen=True)
class BenchConfig:
    """Measure a zeroth-order step beside its two forward passes and beside the textbook loop."""

    model: str = "opt-125m-shape"
    """A shape with random weights (``opt-tiny-shape``, ``opt-125m-shape``, … ``opt-30b-shape``), ``l2l/tiny``,
    a directory, or a hub id."""
    dtype: str = "fp32"
    """``fp32``, ``bf16`` or ``fp16``."""
    out: str = "runs/bench"
    """Directory for ``bench.json``, ``config.yaml`` and ``summary.json``."""
    device: str | None = None
    """Torch device; None: the CPU."""
    batch_size: int = 8
    """Rows per forward pass."""
    length: int = 64
    """Tokens per row."""
    answer_tokens: int | None = None
    """Loss over the last so many tokens only, with logits computed only there; None: over all tokens."""
    threads: int | None = None
    """Threads of torch and of the noise; None: as torch chooses."""
    seed: int = 0
    """Of weights, tokens and directions."""
    warmup: int = 1
    """Untimed steps of each kind at first; peak memory is measured on them."""
    repeats: int = 5
    """Rounds. In each, every kind of step is timed once; figures are medians."""
    update: Literal["auto", "master", "stochastic"] = "auto"
    """How half precision keeps an update: on a float32 master copy, or with stochastic rounding."""
    learned: bool = True
    """Measure the learned method too, with a fresh tuner."""
    textbook: bool = True
    """Measure the textbook's four-pass loop too."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(
            batch_size=self.batch_size,
            warmup=self.warmup,
            repeats=self.repeats,
            threads=1 if self.threads is None else self.threads,
            answer_tokens=1 if self.answer_tokens is None else self.answer_tokens,
        )
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2: the first token of a row is not predicted")
        if self.answer_tokens is not None and self.answer_tokens >= self.length:
            raise ValueError(f"answer_tokens={self.answer_tokens} must be below length={self.length}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")
        check_device(self.device)

    @property
    def torch_device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.device or "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return DTYPES[self.dtype]

    @property
    def half(self) -> bool:
        """Whether the weights are of half precision."""
        return torch.finfo(self.torch_dtype).bits < 32


def check_device(name: str | None) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: torch knows no such device, or CUDA is asked for where there is none.
    """
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown to torch; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not measured; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there (CUDA devices found: {torch.cuda.device_count()}); use cpu")


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def load_average() -> float | None:
    """Processes that wanted to run during the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def hardware() -> dict[str, Any]:
    """Date, versions, processor, graphics card, cores, and how busy the machine is."""
    cores, load = os.cpu_count() or 1, load_average()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": environment()["versions"],
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores,
        "load_average": load,
        "noisy": load is not None and load > cores,
    }


if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 0.02
"""Standard deviation of random matrices."""


def build(name: str, dtype: str, device: torch.device, seed: int = 0, length: int | None = None) -> PreTrainedModel:
    """The model of a name in eval mode. A shape gets the same random weights on every device.

    Args:
        name: a shape of :mod:`l2l.models.shapes`, or what :func:`l2l.models.load.load_model` takes.
        length: tokens per row that it must take.

    Raises:
        ValueError, FileNotFoundError: no such shape or model, or too few positions; before weights are made.
    """
    if name not in SHAPES and not name.endswith("-shape"):
        model = load_model(name, dtype, device)
        context_length(model, length)
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape_config(name), dtype=DTYPES[dtype])
    context_length(empty, length)
    model = empty.to_empty(device=device)
    model.tie_weights()
    fill(model, seed)
    return model.eval()


def fill(model: nn.Module, seed: int) -> None:
    """Matrices become keyed noise, norms one, biases zero: fast, and alike on every device."""
    ones = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    blocks = list(Blocks.of(model, trainable=False))
    for block in blocks:
        block.flat.fill_(1.0 if id(block.tensor) in ones else 0.0)
    matrices: list[Block] = [block for block in blocks if block.tensor.ndim > 1]
    scale = SPREAD / standard_deviation("gaussian")
    pieces = [TensorSlice(block.flat, block.name) for block in matrices]
    add_noise(pieces, [NoiseTerm(Key(seed), [(scale,)] * len(pieces))])


def textbook_step(
    parameters: Sequence[nn.Parameter], closure: Closure, seed: int, lr: float = 1e-6, epsilon: float = 1e-3
) -> float:
    """One step; the mean of the two losses. Torch's global random state is reset four times.

    Raises:
        FloatingPointError: a loss is not finite; the weights stay perturbed then.
    """
    _perturb(parameters, seed, 1.0, epsilon)
    plus = finite_loss(closure)
    _perturb(parameters, seed, -2.0, epsilon)
    minus = finite_loss(closure)
    _perturb(parameters, seed, 1.0, epsilon)
    projected_gradient = (plus - minus) / (2 * epsilon)
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data = parameter.data - lr * projected_gradient * _noise(parameter)
    return (plus + minus) / 2


def _perturb(parameters: Sequence[nn.Parameter], seed: int, sign: float, epsilon: float) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data = parameter.data + sign * _noise(parameter) * epsilon


def _noise(like: Tensor) -> Tensor:
    return torch.normal(mean=0.0, std=1.0, size=like.shape, dtype=like.dtype, device=like.device)


if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step: TypeAlias = Callable[[], float]
"""Does one step (or two forwards) and gives its loss."""

Contender: TypeAlias = Callable[[], AbstractContextManager[Step]]

FORWARDS, STEP, PLAIN, LEARNED, TEXTBOOK = "two_forwards", "step", "plain_step", "learned_step", "textbook_step"
"""Names of the contenders in every result."""

IGNORED = -100
"""Target of a position that predicts nothing: torch's cross entropy leaves it out."""


def tokens(config: BenchConfig, vocabulary: int) -> Tensor:
    """Random token ids [batch_size, length]."""
    draw = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(vocabulary, (config.batch_size, config.length), generator=draw)
    return ids.to(config.torch_device)


def causal_loss(model: PreTrainedModel, ids: Tensor, answer_tokens: int | None) -> Closure:
    """Mean float32 cross entropy of the next token; over all of them, or the last ``answer_tokens`` of each row."""
    targets = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    kept = {} if answer_tokens is None else {"logits_to_keep": answer_tokens + 1}
    targets = targets[:, -(answer_tokens + 1) :] if answer_tokens is not None else targets

    def loss() -> Tensor:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, **kept).logits
            return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    return loss


def contenders(model: PreTrainedModel, closure: Closure, config: BenchConfig) -> dict[str, Contender]:
    """Name -> contender, in the order they take turns in. Every turn has an optimizer and directions of its own."""
    seeds = count(config.seed)

    def fresh(method: Method[Any]) -> ZOOptimizer:
        return ZOOptimizer(model, method, seed=next(seeds), update=config.update)

    found: dict[str, Contender] = {
        FORWARDS: lambda: _forwards(closure),
        STEP: lambda: _managed(fresh(MeZO()), closure),
    }
    if config.learned:
        tuner = Tuner.for_model(model, seed=config.seed)
        found[LEARNED] = lambda: _managed(fresh(Learned(tuner)), closure)
    found[PLAIN] = lambda: _plain(fresh(MeZO()), closure)
    if config.textbook:
        found[TEXTBOOK] = lambda: _textbook(model, closure, next(seeds))
    return found


@contextmanager
def _forwards(closure: Closure) -> Iterator[Step]:
    yield lambda: (finite_loss(closure) + finite_loss(closure)) / 2


@contextmanager
def _managed(optimizer: ZOOptimizer, closure: Closure) -> Iterator[Step]:
    with optimizer.theta.fused_steps():
        yield lambda: optimizer.step(closure)


@contextmanager
def _plain(optimizer: ZOOptimizer, closure: Closure) -> Iterator[Step]:
    yield lambda: optimizer.step(closure)


@contextmanager
def _textbook(model: PreTrainedModel, closure: Closure, seed: int) -> Iterator[Step]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seeds = count(seed)
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        yield lambda: textbook_step(parameters, closure, next(seeds))


RUN_IN = (STEP, LEARNED)
"""Steps of a managed loop are merged with the one before: the first of a turn is not timed."""

Advance = Callable[[float], None]


def peaks(found: Mapping[str, Contender], device: torch.device, steps: int, advance: Advance) -> dict[str, int]:
    """Name -> most bytes in use during so many steps, weights and the setting up included; also the warm-up."""
    bytes_of: dict[str, int] = {}
    for name, contender in found.items():
        _release(device)
        with PeakMemory(device) as peak, contender() as step:
            losses = [step() for _ in range(steps + (name in RUN_IN))]
            wait(device)
        bytes_of[name] = peak.bytes
        advance(losses[-1])
    return bytes_of


def rounds(
    found: Mapping[str, Contender], device: torch.device, repeats: int, advance: Advance
) -> dict[str, list[float]]:
    """Name -> seconds of a step in each round. The order is reversed from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats):
        names = list(found)
        for name in names if number % 2 == 0 else names[::-1]:
            with found[name]() as step:
                if name in RUN_IN:
                    step()
                spent, loss = timed(step, device)
            seconds[name].append(spent)
            advance(loss)
    return seconds


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds that a step took, and its loss."""
    wait(device)
    start = time.perf_counter()
    loss = step()
    wait(device)
    return time.perf_counter() - start, loss


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float | None:
    """Median over rounds of one contender's seconds over another's; None where one was not measured."""
    if above not in seconds or below not in seconds:
        return None
    return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that a change of any bit changes: two sums over the bits, one weighted by position, modulo 2**64."""
    found = 0
    for tensor in tensors:
        bits = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        for part in bits.split(2**22):
            wide = part.to(torch.int64)
            place = torch.arange(1, 2 * len(wide), 2, device=wide.device)
            found = (found * 31 + int(wide.sum()) * 7 + int((wide * place).sum())) % 2**64
    return found


GIB = 2**30

HEADLINE = (
    *("shape", "dtype", "device", "threads", "backend"),
    *("step_over_two_forwards", "plain_step_over_two_forwards", "reference_over_ours", "learned_over_mezo"),
    *("peak_over_inference", "tokens_per_second", "restore_bit_identical", "noisy"),
)
"""What is printed of a result."""


def headline(found: Mapping[str, Any]) -> dict[str, object]:
    """The figures that are printed, and the medians in seconds; what was not measured is left out."""
    shown = {name: found[name] for name in HEADLINE if found[name] is not None}
    return shown | {f"seconds, {name.replace('_', ' ')}": value for name, value in found["seconds"].items()}


def row(found: Mapping[str, Any]) -> dict[str, str]:
    """A result as a row of a Markdown table. Memory in GiB."""
    seconds, peak = found["seconds"], found["peak_bytes"]
    shown = {
        "shape": found["shape"],
        "dtype": found["dtype"],
        "threads": found["threads"],
        "backend": found["backend"],
        "two forwards, s": seconds["two_forwards"],
        "step, s": seconds["step"],
        "textbook, s": seconds.get("textbook_step"),
        "step / two forwards": found["step_over_two_forwards"],
        "plain step / two forwards": found["plain_step_over_two_forwards"],
        "textbook / step": found["reference_over_ours"],
        "learned / MeZO": found["learned_over_mezo"],
        "tokens/s": found["tokens_per_second"],
        "peak, forward": peak["two_forwards"] / GIB,
        "peak, step": peak["step"] / GIB,
        "peak, textbook": peak["textbook_step"] / GIB if "textbook_step" in peak else None,
        "peak step / forward": found["peak_over_inference"],
        "restored bit for bit": found["restore_bit_identical"],
    }
    return {name: cell(value) for name, value in shown.items()}


def cell(value: object) -> str:
    """A value as a cell: four digits, words for truth, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the keys of the first as columns; a row may lack some."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row.get(name, "-") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(title: str, machine: Mapping[str, Any], command: str, parts: Sequence[str]) -> str:
    """A dated page: hardware, versions, the command that made it, then its parts.

    Args:
        machine: what :func:`l2l.tools.bench.hardware` gives.
    """
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = "unknown" if machine["load_average"] is None else f"{machine['load_average']:.2f}"
    noisy = " **The machine was busy: times are noisy.**" if machine["noisy"] else ""
    facts = f"{machine['cpu']}, {machine['cores']} cores, load {load}, {machine['gpu'] or 'no GPU'}; {versions}.{noisy}"
    return "\n\n".join([f"# {machine['date']}: {title}", facts, f"`{command}`", *parts]) + "\n"


if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULT = "bench.json"
LOOKS = 3
"""Steps without an update after which half-precision weights must be what they were, bit for bit."""

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

logger = logging.getLogger("l2l")


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, and leave ``bench.json``, ``config.yaml`` and ``summary.json`` in ``out``; the figures.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    found = measure(config)
    folder.create()
    write_json(folder.path / RESULT, found)
    folder.finish(found | {"config": asdict(config)})
    return found


def measure(config: BenchConfig) -> dict[str, Any]:
    """The figures, written nowhere: ratios, medians in seconds, peaks in bytes, and what they were measured on.

    A ratio of times is the median over rounds of the ratios within a round. Peaks count the weights, but not what the
    process holds beside them after a first forward pass: interpreter, libraries, tokens.

    Raises:
        ValueError, FileNotFoundError: as :func:`l2l.tools.bench.build`.
    """
    machine = hardware()
    if machine["noisy"]:
        logger.warning("load %.1f on %d cores: times are noisy", machine["load_average"], machine["cores"])
    with _threads(config.threads):
        model = build(config.model, config.dtype, config.torch_device, config.seed, config.length)
        return _head(config, model) | _figures(config, model) | machine


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """So many threads inside, as many as before afterwards."""
    earlier = torch.get_num_threads()
    try:
        torch.set_num_threads(wanted or earlier)
        yield
    finally:
        torch.set_num_threads(earlier)


def _head(config: BenchConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What was measured."""
    blocks = Blocks.of(model, trainable=False)
    sizes = [block.numel * block.tensor.element_size() for block in blocks]
    return {
        "shape": config.model,
        "dtype": SHORT[config.torch_dtype],
        "device": str(config.torch_device),
        "backend": active_backend(config.torch_device, config.torch_dtype),
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "length": config.length,
        "answer_tokens": config.answer_tokens,
        "parameters": blocks.numel,
        "weight_bytes": sum(sizes),
        "largest_block_bytes": max(sizes),
    }


def _figures(config: BenchConfig, model: PreTrainedModel) -> dict[str, Any]:
    device = config.torch_device
    closure = causal_loss(model, tokens(config, model.config.get_text_config().vocab_size), config.answer_tokens)
    beside = _beside_weights(model, closure, device)
    found = contenders(model, closure, config)
    with progress_bar("bench", len(found) * (config.repeats + 1), visible=config.progress) as advance:
        used = {name: peak - beside for name, peak in peaks(found, device, config.warmup, advance).items()}
        seconds = rounds(found, device, config.repeats, advance)
    step = median(seconds[STEP])
    optimizer = ZOOptimizer(model, MeZO(), seed=config.seed, update=config.update)
    return {
        "step_over_two_forwards": ratio(seconds, STEP, FORWARDS),
        "plain_step_over_two_forwards": ratio(seconds, PLAIN, FORWARDS),
        "reference_over_two_forwards": ratio(seconds, TEXTBOOK, FORWARDS),
        "reference_over_ours": ratio(seconds, TEXTBOOK, STEP),
        "learned_over_mezo": ratio(seconds, LEARNED, STEP),
        "peak_over_inference": _share(used, STEP),
        "learned_peak_over_inference": _share(used, LEARNED),
        "reference_peak_over_inference": _share(used, TEXTBOOK),
        "tokens_per_second": config.batch_size * config.length / step,
        "update": optimizer.theta.update,
        "restore_bit_identical": restored(optimizer, closure) if config.half else None,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "samples": seconds,
        "peak_bytes": used,
        "bytes_beside_weights": beside,
    }


def _beside_weights(model: PreTrainedModel, closure: Closure, device: torch.device) -> int:
    """Bytes in use that are not weights; measured after a forward pass, which loads libraries."""
    finite_loss(closure)
    weights = sum(block.numel * block.tensor.element_size() for block in Blocks.of(model, trainable=False))
    return current_bytes(device) - weights


def _share(used: Mapping[str, int], name: str) -> float | None:
    """Peak of a contender over that of inference; None where there is nothing to compare."""
    return used[name] / used[FORWARDS] if name in used and used[FORWARDS] > 0 else None


def restored(optimizer: ZOOptimizer, closure: Closure) -> bool:
    """Whether steps that look but do not move leave every bit of the weights as it was."""
    weights, method = [block.tensor for block in optimizer.blocks], optimizer.method
    if isinstance(method, FirstOrder):
        return True  # it looks nowhere
    before = checksum(weights)
    for number in range(LOOKS):
        with optimizer.theta.step():
            direction = Direction(Key(optimizer.seed, number), (1.0,) * len(weights))
            two_point(closure, optimizer.theta, direction, method.epsilon)
    return checksum(weights) == before
