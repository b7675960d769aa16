"""Kind A12: an advice that loops. Every way out that an error prints is taken: the error is provoked, its advice is run.

A message is known by a piece of its template. The rule test reads all messages of the package: one that advises (an option
with ``--``, or ``pass``, ``use``, ``set``, ``choose``, ``try``) must have a case in :data:`CASES`, or be among
:data:`ELSEWHERE`, whose ways out another test takes. What this machine cannot do (a GPU, a hub, a package that is not
installed, a full disk) a stand-in does, in the case's words. Cases run in an empty directory.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, get_args
from unittest import mock

import numpy as np
import peft
import pytest
import torch
import yaml
from cases import Quadratic, TiedLM
from transformers.pytorch_utils import Conv1D

import l2l
from l2l import cli, costs, optim, tuner_commands
from l2l.experiments import runner
from l2l.experiments.presets import compare, plan, quickstart
from l2l.experiments.spec import CompareConfig, Contender
from l2l.meta import bases
from l2l.meta.config import MetaTrainConfig, with_defaults
from l2l.methods.registry import build_method
from l2l.models import heads, kinds, load, prefix, schemes, shapes
from l2l.models.shapes import tiny_random
from l2l.noise import Key, dispatch
from l2l.optim import ZOOptimizer
from l2l.params import Basis, Blocks, Direction, PerturbedParameters
from l2l.report.run_directory import RunDirectory, lock_directory, unlock_directory
from l2l.tasks import encode, evaluate, sources, yaml_task
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tools import estimate, init, lr_probe, run_report
from l2l.train import baselines, cluster, several
from l2l.train import prefix as prefix_cache
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import load_run_inputs
from l2l.train.replay import ReplayConfig, replay_command
from l2l.train.runlog import NAME as LOG
from l2l.train.runlog import read_log
from l2l.train.trainer import prepare_fine_tuning
from l2l.tuners import published
from l2l.tuners.normalize import CurvatureNormalizer, EnergyNormalizer

PACKAGE = Path(__file__).parent.parent / "l2l"
ADVICE = re.compile(r"--[a-z]|\b(pass|use|set|choose|try)\b")
Call = Callable[[], Any]

SMALL: dict[str, Any] = {"batch_size": 2, "train_size": 8, "dev_size": 4, "test_size": 4, "steps": 2, "progress": False}


def config(**options: Any) -> Call:
    return lambda: FineTuneConfig(**options)


def meta(**options: Any) -> Call:
    return lambda: with_defaults(MetaTrainConfig(**options))


def prepared(**options: Any) -> Call:
    """Everything up to the first step, and one step."""

    def prepare() -> None:
        context = prepare_fine_tuning(FineTuneConfig(**{**SMALL, **options}))
        context.optimizer.step(context.closures.at(0), lambda number: context.closures.further(0, number))

    return prepare


def mezo(model: Callable[[], torch.nn.Module] = Quadratic, **options: Any) -> Call:
    def step() -> None:
        made = model()
        l2l.MeZO(made, **options).step(made)

    return step


def half(dtype: torch.dtype) -> Callable[[], torch.nn.Module]:
    return lambda: Quadratic().to(dtype)


def sgd(**options: Any) -> Call:
    model = Quadratic().bfloat16()
    return lambda: ZOOptimizer(model, build_method("sgd", 1e-3, {}, None, model), 1e-3, **options).step(model)


def frozen(free: bool) -> Call:
    model = Quadratic()
    model.requires_grad_(False)
    model.vector.requires_grad_(free)
    return lambda: l2l.MeZO(model).step(model)


@cache
def size_free() -> l2l.Tuner:
    return l2l.Tuner.for_model(l2l.load_model("l2l/tiny"), "shared_mlp")


def tuned(scheme: str = "lora", tuner: Any = "l2l-tiny", **options: Any) -> Call:
    given = {**SMALL, "method": "learned", "scheme": scheme, **options}

    def prepare() -> None:
        found: Any = tuner() if callable(tuner) else l2l.Tuner.from_pretrained(tuner)
        context = prepare_fine_tuning(FineTuneConfig(**given), tuner=found)
        context.optimizer.step(context.closures.at(0))

    return prepare


def bound(match: str) -> Call:
    """The tuner of the embedded model on a model of another size."""
    return lambda: l2l.Tuner.from_pretrained("l2l-tiny").matched(tiny_random("llama"), match)  # type: ignore[arg-type]


def method(name: str, **args: Any) -> Call:
    def built() -> None:
        model = Quadratic()
        made = build_method(name, 1e-3, args, None, model)
        made.init(Blocks.of(model))

    return built


def instead(owner: Any, name: str, value: Any, call: Call) -> Call:
    """The call, with a stand-in for an attribute, or for an environment variable."""

    def called() -> Any:
        with mock.patch.dict(owner, {name: value}) if owner is os.environ else mock.patch.object(owner, name, value):
            return call()

    return called


def stepped(name: str, closure: Callable[[Any], Any] = lambda model: model(), **args: Any) -> Call:
    """A step of a method."""

    def step() -> None:
        model = TiedLM()
        ZOOptimizer(model, build_method(name, 1e-3, args, None, model), 1e-3).step(lambda: closure(model))

    return step


def of_optimizer(change: Callable[[ZOOptimizer, Quadratic], Any]) -> Call:
    """A change to an optimizer of one of two blocks, and a step."""

    def step() -> None:
        model = Quadratic()
        model.vector.requires_grad_(False)
        optimizer = l2l.MeZO(model)
        change(optimizer, model)
        optimizer.step(model)

    return step


def add_group(optimizer: ZOOptimizer, model: Quadratic) -> None:
    optimizer.add_param_group({"params": [model.vector], "lr": 1e-4})


def thaw(optimizer: ZOOptimizer, model: Quadratic) -> None:
    model.vector.requires_grad_(True)
    optimizer.rebind(model)


@cache
def tokenizer_() -> Any:
    return load.load_tokenizer("l2l/tiny")


def words(family: str, **options: Any) -> Any:
    """A tiny model of that family that knows the tokens of the embedded one."""
    return tiny_random(family, vocab_size=len(tokenizer_()), pad_token_id=0, **options)


def scheme(name: str, model: Callable[[], Any], **args: Any) -> Call:
    return lambda: schemes.apply_scheme(model(), name, args)


def headless() -> Any:
    """A model that names neither a head nor an inner model."""
    return tiny_random("llama").model


def adapters(choose: Callable[[Any], Any] = lambda model: None) -> Call:
    """Two adapters that are active together, but for what is chosen."""

    def checked() -> None:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model: Any = peft.get_peft_model(tiny_random("llama"), lora, adapter_name="first")
        model.add_adapter("second", lora)
        model.base_model.set_adapter(["first", "second"])
        choose(model)
        schemes.check_adapter(model)
        schemes.save_adapter(model, "saved", schemes.AdapterBase("base", None))

    return checked


def merge(model: Any) -> None:
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")


def task_of(*options: str, answers: tuple[str, ...] = (), varied: bool = False) -> Task:
    def example(row: Any) -> Example:
        own = (f" {row['text']}",) if varied else ()
        return Example("the film was", (*(f" {option}" for option in options), *own), (0,), answers)

    return Task("mine", GeneratedData(lambda *_: []), (), example)


def encoded(task: Task, model: Callable[[], Any], change: Callable[[Any, Any], None] = lambda model, tokenizer: None) -> Call:
    def encode_() -> None:
        made, tokenizer = model(), load.load_tokenizer("l2l/tiny")
        change(made, tokenizer)
        encode.encoder_for(made).encode(task, [{"text": "good"}, {"text": "bad"}], tokenizer, 100)

    return encode_


def classifier(labels: int = 2) -> Any:
    return words("llama", head="classifier", num_labels=labels)


def no_padding(model: Any, tokenizer: Any) -> None:
    model.config.pad_token_id = tokenizer.pad_token = None


def its_end(model: Any, tokenizer: Any) -> None:
    no_padding(model, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token


def its_config(model: Any, tokenizer: Any) -> None:
    no_padding(model, tokenizer)
    model.config.pad_token_id = 0


def started(change: Callable[[Any], None]) -> Call:
    """Where an encoder-decoder starts that says nothing of it, but for the change."""

    def start() -> None:
        model = tiny_random("t5")
        for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id"):
            setattr(model.config, name, None)
            setattr(model.generation_config, name, None)
        change(model)
        encode.decoder_start(model)

    return start


def answered(family: str) -> Call:
    return lambda: evaluate.generate(words(family), tokenizer_(), ["the film"], 60, max_new_tokens=2)


CHOICES: dict[str, Any] = {
    **{"task": "mine", "data_files": {"train": "train.csv"}, "doc_to_text": "{{ text }} she was", "doc_to_target": "mood"},
    **{"output_type": "multiple_choice", "doc_to_choice": ["sad", "happy"]},
}
ANSWERS: dict[str, Any] = {**CHOICES, "output_type": "generate_until", "doc_to_choice": None}


def written(fields_: dict[str, Any], **changes: Any) -> str:
    """A task file and its rows."""
    rows = [f"lily {'lost' if n % 2 else 'found'} ball number {n} .,{('happy', 'sad')[n % 2]}\n" for n in range(40)]
    Path("train.csv").write_text("text,mood\n" + "".join(rows))
    given = {name: value for name, value in {**fields_, **changes}.items() if value is not None}
    Path("mine.yaml").write_text(yaml.safe_dump(given))
    return "mine.yaml"


def task_file(fields_: dict[str, Any] = CHOICES, **changes: Any) -> Call:
    return lambda: yaml_task.read_task(Path(written(fields_, **changes)))


def on_answers(**options: Any) -> Call:
    """A step on a task with generated answers."""
    return lambda: prepared(task=written(ANSWERS), **options)()


def baseline(name: str, task: str | dict[str, Any] = "world_topic", family: str | None = None) -> Call:
    def measure() -> None:
        file = task if isinstance(task, str) else written(task)
        given = FineTuneConfig(**SMALL, max_new_tokens=2, task=file).completed()
        model = None if family is None else words(family)
        baselines.build_baseline(name, {}).measure(load_run_inputs(given, model, None if model is None else tokenizer_()))

    return measure


def probed(*epsilons: float, loss: Callable[[Quadratic], Any] = lambda model: model()) -> Call:
    def probe() -> None:
        model = Quadratic().double()
        given = lr_probe.ProbeConfig(probes=4, sweep=2, epsilons=list(epsilons))
        method_ = build_method("mezo", 1e-3, {}, None, model)
        theta = PerturbedParameters(Blocks.of(model))
        lr_probe.probe(theta, method_, lambda step, number: lambda: loss(model), given, 2.0**-48)  # type: ignore[arg-type]

    return probe


def near(model: Quadratic) -> Any:
    """A loss that overflows far from the start."""
    return model() if (model.vector - Quadratic().vector).abs().max() < 0.02 else float("inf")


def in_steps(model: Quadratic) -> Any:
    """A loss that is flat in small neighbourhoods."""
    return model().round()


def estimated(device: str | None = None) -> Call:
    return lambda: estimate.run_estimate(estimate.EstimateConfig(model="opt-tiny-shape", device=device, batch_size=1, length=8))


def run(steps: int = 3, out: str = "run", overwrite: bool = False, inputs: str = "rows", **more: Any) -> Call:
    """The beginning of a run, which leaves a checkpoint."""

    def begun() -> None:
        folder = RunDirectory(out, {"steps": steps, "out": out, **more}, overwrite)
        folder.identify({"train": inputs}).create().write_checkpoint({"step": 1})
        folder.release()

    return begun


def tried(out: str, needed: int) -> Call:
    def trial() -> None:
        Path(out).mkdir(exist_ok=True)
        with RunDirectory(out, {"out": out}).trial(needed):
            pass

    return trial


def after(first: Call, call: Call) -> Call:
    return lambda: (first(), call())


def once_let_go() -> None:
    """Waits until the run that holds the folder has ended; here the same process holds it, by another file."""
    unlock_directory(Path("."), LOCKED.pop())
    unlock_directory(Path("."), lock_directory(Path(".")))


LOCKED: list[int] = []


def locked_twice() -> None:
    LOCKED.append(lock_directory(Path(".")))
    lock_directory(Path("."))


def elsewhere() -> None:
    Path("other").mkdir()
    unlock_directory(Path("other"), lock_directory(Path("other")))


def placed(asked: str, size: int, memory: int = 1000, disk: int = 1000) -> Call:
    """Where a prefix cache of so many bytes goes; a machine with so many bytes free is stood in for."""
    usage = shutil.disk_usage("/")._replace(free=disk)
    place = partial(prefix_cache.choose_place, asked, size, torch.device("cpu"), Path("out"))
    there = instead(prefix_cache, "available_bytes", lambda device: memory, place)
    return instead(shutil, "disk_usage", lambda path: usage, there)


def pickled(out: str, **options: Any) -> Call:
    """The import of a published tuner of a tiny model's blocks."""

    def imported() -> None:
        tiny_random("llama", num_hidden_layers=1).config.save_pretrained("model")
        layers = [torch.nn.Linear(5, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)]
        names = tuner_commands.fingerprint_of("model").names
        torch.save({name: torch.nn.Sequential(*layers) for name in names}, "tuner.pth")
        tuner_commands.import_tuner(tuner_commands.ImportConfig("tuner.pth", "me/model", out, **options))

    return imported


def taken(name: str = "taken") -> None:
    Path(name).mkdir(exist_ok=True)
    Path(name, "mine").write_text("mine")


def deeper(match: str, freeze: bool = False) -> Call:
    """A tuner on its model with a further layer."""

    def bind() -> None:
        model = tiny_random("llama", num_hidden_layers=2)
        made = l2l.Tuner.for_model(tiny_random("llama", num_hidden_layers=1))
        model.model.layers[1].requires_grad_(not freeze)
        made.matched(model, match)  # type: ignore[arg-type]

    return bind


def planned(**scores: dict[str, float]) -> Call:
    """The choice of a plan among two depths, by scores at two budgets."""
    candidates = [plan.Candidate({"method": "learned", "lr": "auto"}, layers) for layers in ("top:1", "all")]
    labels = {"top": candidates[0].label, "all": candidates[1].label}
    found = {
        float(at.removeprefix("passes_")): {labels[name]: score for name, score in own.items()} for at, own in scores.items()
    }
    return lambda: plan.choose_plan(candidates, found, 4)


def planning(task: str) -> Call:
    return lambda: plan.PlanConfig(tasks=[task], candidates=[{"method": "learned", "lr": "auto"}], depths=["all"])


def quick(*tasks: str) -> Call:
    """The quickstart, but for its runs."""
    start = partial(quickstart.run_quickstart, quickstart.QuickstartConfig(out="quick", tasks=list(tasks), overwrite=True))
    return instead(quickstart, "_quickstart", lambda *_: {}, start)


def comparison(**options: Any) -> CompareConfig:
    given: dict[str, Any] = {
        **{"settings": [{"name": "tiny", "tasks": ["world_stars"], "batch_size": 4}], "methods": ["mezo", "dizo"]},
        **{"grid": [1e-4, 1e-3], "step_fraction_grid": [0.1, 0.2], "passes": 4, "seeds": 1, "evaluations": 1, "out": "out"},
        **{"train_size": 16, "dev_size": 8, "test_size": 8, "progress": False},
    }
    return CompareConfig(**{**given, **options})


def compared(**options: Any) -> Call:
    """The checks of a comparison."""

    def check() -> None:
        given = comparison(**options)
        runner.check_all(given, given.contenders)

    return check


def shared(runs: str | None, out: str = "out") -> Call:
    """The directories of a comparison."""

    def made() -> None:
        Path("file").write_text("")
        with runner.experiment_folder(comparison(runs=runs, out=out), []):
            pass

    return made


def both_ways(*names: str) -> Call:
    """A step along a direction with a basis, or along the low rank of a method, or both."""

    def step() -> None:
        blocks, key = Blocks.of(torch.nn.Linear(8, 6, bias=False)), Key(1, 2)
        lozo: Any = build_method("lozo", 1e-3, {}, None, Quadratic())
        basis = Basis({0: torch.eye(8)[:, :2]})
        found = {
            "basis": Direction(key, (1.0,), basis=basis, basis_sigma=(1.0,)),
            "shape": lozo.direction(blocks, lozo.init(blocks), key),
        }
        theta = PerturbedParameters(blocks)
        with theta.step():
            for name in names:
                theta.add(found[name], [1e-3])

    return step


def importing(module: Any) -> Callable[[str], Any]:
    """Stands in for a package that is installed, or is not."""

    def imported(name: str) -> Any:
        if module is None:
            raise ImportError(name)
        return module

    return imported


JOINED, ALONE = ModuleType("ray"), ModuleType("ray")  # stand in for Ray, connected and not
JOINED.is_initialized, ALONE.is_initialized, ALONE.init = lambda: True, lambda: False, lambda **_: None


def joined(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        runner.executor_of("ray", 1, address.format(f"127.0.0.1:{server.getsockname()[1]}"))


def shared_by(**options: Any) -> Call:
    return lambda: several.enlist(FineTuneConfig(**options).completed())


def gradient_basis() -> None:
    model = Conv1D(9, 6)
    losses = bases.Losses("mine", lambda number: lambda: model(torch.ones(1, 6)).square().sum(), 2)
    bases.gradient_basis(PerturbedParameters(Blocks.of(model)), [losses], 2, (0,))


def noise(name: str) -> Call:
    return instead(os.environ, dispatch.VARIABLE, name, lambda: dispatch._serving.__wrapped__(name, "cpu", True))


def read_only(*given: Any, **options: Any) -> Any:
    """Stands in for a disk to which nothing can be written below ``run``."""
    if Path(options["dir"]).name == "run":
        raise PermissionError(13, "Permission denied")
    return TEMPORARY(*given, **options)


@cache
def logged() -> bytes:
    """The log of a run of three steps."""
    with tempfile.TemporaryDirectory() as folder:
        l2l.fine_tune("l2l/tiny", "world_topic", out=f"{folder}/run", save="log", **{**SMALL, "steps": 3})
        return Path(folder, "run", LOG).read_bytes()


def replayed(**options: Any) -> Call:
    def replay() -> None:
        if not Path(LOG).exists():
            Path(LOG).write_bytes(logged())
        replay_command(ReplayConfig(LOG, **options))

    return replay


def damaged() -> None:
    """A log whose last step was flipped."""
    content, ends = bytearray(logged()), []
    Path(LOG).write_bytes(content)
    ends = read_log(Path(LOG)).ends
    content[ends[-2] - 6] ^= 1
    Path(LOG).write_bytes(content)
    replayed()()


def table(**options: Any) -> Call:
    """A task of a table; its files may be there."""

    def made() -> None:
        rows = [f"lily ran home number {n} .,{n % 2 or ''},{n},{'xy'[n % 2]}\n" for n in range(20)]
        Path("moods.csv").write_text("text,mood,id,kind\n" + "".join(rows))
        init.run_init(init.InitConfig("moods.csv", **options))

    return made


def saved_as(name: str, content: str) -> Call:
    """The columns of a table of that name."""
    return lambda: (Path(name).write_text(content), init.read_frame(Path(name)))


def reported(*runs: str, **options: Any) -> Call:
    """A report of a run of three steps."""

    def report() -> None:
        if not Path("run").exists():
            l2l.fine_tune("l2l/tiny", "world_topic", out="run", save="log", **{**SMALL, "steps": 3})
        run_report.run_report(run_report.ReportConfig([*runs], **options))

    return report


TEMPORARY = tempfile.TemporaryDirectory
QUANTISED = partial(instead, load, "find_spec", lambda package: package)
"""Stands in for the packages that quantise, which this machine may not have."""


TOP = {"train_layers": "top:1"}
CASES: dict[str, tuple[Call, list[Call]]] = {
    # a piece of the message: (what it is said of, what it advises)
    "are directions of top_blocks, which name no block": (
        lambda: l2l.optim.RSGN(torch.nn.Linear(4, 2), top_directions=2),
        [
            lambda: l2l.optim.RSGN(torch.nn.Linear(4, 2), top_directions=2, top_blocks=["weight"]),
            lambda: l2l.optim.RSGN(torch.nn.Linear(4, 2)),
        ],
    ),
    "trains what lies below all layers": (
        config(scheme="prefix", **TOP), [config(scheme="prefix"), config(scheme="lora", **TOP)],
    ),
    "takes a learning rate of its own size": (config(method="adamw"), [config(method="adamw", lr=1e-5)]),
    "stream_layers leaves layers out of memory": (
        config(stream_layers=True), [config(stream_layers=True, train_layers="top:5")],
    ),
    "objective is {}; use one of": (config(objective="bleu"), [config(objective=o) for o in ("loss", "accuracy", "f1")]),
    "micro_batch is set, but": (
        config(objective="package.module:function", micro_batch=2), [config(objective="package.module:function")],
    ),
    "parallel='data' splits batches": (
        config(parallel="data", objective="json:dumps"),
        [config(parallel="population", objective="json:dumps", method="es")],
    ),
    "scheme is {}": (lambda: l2l.models.schemes.check_scheme("qlora", {}), [config(scheme="lora"), config(scheme="head")]),
    "match is {}": (lambda: l2l.tuners.transfer.check_level("any"), [config(match=m) for m in ("exact", "shape", "kind")]),
    "schedule is {}": (
        lambda: optim.check_schedule("step", 0.0), [config(schedule=name) for name in ("constant", "linear", "cosine")],
    ),
    "unknown dtype {}; use one of": (
        lambda: l2l.load_model("l2l/tiny", "int3"),
        [lambda: l2l.load_model("l2l/tiny", "bfloat16"), lambda: l2l.load_model("l2l/tiny", "fp16")],
    ),
    "objective {} takes no backward pass": (
        meta(objective="evolution"),
        [meta(objective="evolution", trajectory="zo"), meta(objective="evolution", trajectory_gradient="own")],
    ),
    "has no members that several processes": (
        meta(processes=2),
        [
            meta(processes=2, objective="evolution", trajectory="zo"),
            meta(processes=2, objective="es_full_run", trajectory="zo"),
            meta(),
        ],
    ),
    "task_weights are given, but": (
        meta(tasks=["rte", "boolq"], task_weights=[1, 2]),
        [meta(tasks=["rte", "boolq"], task_weights=[1, 2], sampling="random")],
    ),
    "tasks is empty": (meta(model="some/model"), [meta(model="some/model", tasks="rte,boolq,copa")]),
    "sets lr={}": (lambda: Contender(options={"lr": 1e-3}), [Contender, lambda: Contender(options={"lr": "auto"})]),
    "without antithetic is a population of one": (
        method("es", num_directions=1, antithetic=False),
        [method("es", num_directions=2, antithetic=False), method("es", num_directions=1, antithetic=True)],
    ),
    "use two_sided estimates, which share no loss": (
        method("blockwise+mezo", blockwise={"apply": "at once"}, mezo={"estimator": "one_sided"}),
        [method("blockwise+mezo", blockwise={"apply": "at once"})],
    ),
    "takes a step of the method inside for every group": (
        method("blockwise+momentum", blockwise={"apply": "at once"}),
        [method("blockwise+momentum", blockwise={"apply": "after"})],
    ),
    "so step_fraction and curvature_lr mean nothing": (
        mezo(lr=1e-3, step_fraction=0.1), [mezo(lr="auto", step_fraction=0.1), mezo(lr=1e-3)],
    ),
    "moves half-precision weights by a float32 copy": (sgd(update="stochastic"), [sgd(update="master")]),
    "the model has no trainable parameter": (frozen(False), [frozen(True)]),
    "half-precision weights drift": (
        mezo(half(torch.bfloat16), perturb="in_place"),
        [mezo(half(torch.bfloat16), perturb="functional"), mezo(perturb="in_place")],
    ),
    "sparse_embeddings is set, but": (mezo(sparse_embeddings=True), [mezo()]),
    "rounds to bfloat16, but block": (
        mezo(half(torch.float16), update="stochastic"), [mezo(half(torch.float16), update="master")],
    ),
    "perturb='in_place' needs float32 weights": (
        lambda: costs.choose_perturb_mode(torch.bfloat16, "in_place"),
        [
            lambda: costs.choose_perturb_mode(torch.bfloat16, "functional"),
            lambda: costs.choose_perturb_mode(torch.float32, "in_place"),
        ],
    ),
    "update='stochastic' rounds to bfloat16: use": (
        lambda: costs.choose_update(torch.float16, "stochastic", 1, 1),
        [
            lambda: costs.choose_update(torch.float16, "master", 1, 1),
            lambda: costs.choose_update(torch.bfloat16, "stochastic", 1, 1),
        ],
    ),
    "the curvature overflows at epsilon": (
        lambda: optim.curvature(1.0, 1.0, 0.0, 1e-200), [lambda: optim.curvature(1.0, 1.0, 0.0, 1e-3)],
    ),
    "the curvature from the outputs is {}": (
        lambda: optim.least_curvature(0.0, 1e300, 1e-20, 0.5), [lambda: optim.least_curvature(0.0, 1e30, 1e-2, 0.5)],
    ),
    "layers, but the model has": (
        prepared(train_layers="top:99"), [prepared(train_layers="all"), prepared(train_layers="top:2")],
    ),
    "compares generated answers, and task": (
        prepared(objective="f1"), [prepared(objective="accuracy"), prepared(objective="loss")],
    ),
    "needs the gradient of what it minimises": (
        prepared(method="adamw", lr=1e-5, objective="accuracy"),
        [prepared(method="adamw", lr=1e-5, objective="loss"), prepared(method="mezo", objective="accuracy")],
    ),
    "compile=True needs weights that are perturbed in place": (
        prepared(compile=True, perturb="functional"), [prepared(perturb="functional")],
    ),
    "takes no tuner: leave it out, or use method": (
        tuned("full", method="mezo"),
        [prepared(method="mezo"), tuned("full", method="learned"), tuned("full", method="learned+mezo")],
    ),
    "has a sigma for each block of the full model": (
        tuned(),
        [tuned("full"), tuned(tuner=size_free), *(tuned(s, match="kind") for s in ("lora", "ia3", "prefix", "prompt"))],
    ),
    "does not fit this model": (bound("exact"), [bound("kind")]),
    "the closure's value carries no derivative": (
        stepped("forward_grad", lambda model: model().item()),
        [prepared(method="forward_grad", objective="loss"), stepped("mezo", lambda model: model().item())],
    ),
    "no candidate has runs that ended at every budget": (  # a stand-in for the runs: their scores
        planned(passes_9={"top": 0.1}, passes_99={}),
        [planned(passes_9={"top": 0.1, "all": 0.3}, passes_99={"top": 0.3, "all": 0.2})],
    ),
    "is held out: choose plans on tasks of the pool": (planning("world_stars"), [planning("world_topic")]),
    "has no recorded learning rates": (
        quick("world_trait"),
        [quick("world_stars", "world_opposite"), compared(settings=[{"name": "tiny", "tasks": ["world_trait"]}])],
    ),
    "is not a directory: choose another, or leave it out": (shared("file"), [shared("runs"), shared(None, "other")]),
    "executor: ray needs Ray": (
        instead(cluster, "import_module", importing(None), lambda: runner.executor_of("ray", 1)),
        [
            instead(cluster, "import_module", importing(JOINED), lambda: runner.executor_of("ray", 1)),
            lambda: runner.executor_of("local", 1),
        ],
    ),
    "shares the directions of a step, and parallel is": (
        shared_by(executor="ray"),
        [shared_by(executor="ray", parallel="population", num_directions=4), shared_by(parallel="data")],
    ),
    "no Ray cluster can be joined there": (
        instead(cluster, "import_module", importing(ALONE), lambda: runner.executor_of("ray", 1, "127.0.0.1:1")),
        [
            instead(cluster, "import_module", importing(ALONE), lambda address=address: joined(address))
            for address in ("{}", "ray://{}", "auto", "local")
        ],
    ),
    "would choose among {} step sizes": (
        compared(methods=["mezo", {"method": "dizo", "grid": [1e-4, 1e-3, 1e-2]}]),
        [
            compared(methods=["mezo", {"method": "dizo", "grid": [1e-3, 1e-2]}]),
            compared(methods=["mezo", {"label": "a", "method": "mezo", "options": {"lr": "auto"}}]),
        ],
    ),
    "no weight matrix belongs to an nn.Linear": (
        lambda: bases.linear_layers(Conv1D(9, 6), Blocks.of(Conv1D(9, 6)), [0]), [gradient_basis],
    ),
    "hybrid needs the gradient": (
        stepped("hybrid+mezo", lambda model: model().item()),
        [prepared(method="hybrid+mezo", objective="loss"), stepped("mezo", lambda model: model().item())],
    ),
    "compile needs a C++ compiler": (
        instead(os.environ, "CXX", "no-such-compiler", lambda: heads.compile_decoder(tiny_random("llama"))),
        [instead(os.environ, "CXX", sys.executable, lambda: heads.compile_decoder(tiny_random("llama"))), prepared()],
    ),
    "head is {}": (
        lambda: kinds.kind_of_config(tiny_random("llama").config, "encoder"),  # type: ignore[arg-type]
        [lambda: [kinds.kind_of_config(tiny_random("llama").config, name) for name in get_args(kinds.Head)]],
    ),
    "quantize is {}": (
        lambda: load.check_quantize("int3"),
        [QUANTISED(lambda: [load.check_quantize(name) for name in get_args(load.Quantize)])],
    ),
    "freezes the weights that scheme 'full' trains": (
        config(quantize="bnb4", scheme="full"),
        [QUANTISED(config(quantize="bnb4", scheme="lora")), config(scheme="full")],
    ),
    "is none that torch can use here": (
        lambda: l2l.load_model("l2l/tiny", device="abacus"),
        [lambda: l2l.load_model("l2l/tiny", device="cpu"), prepared(device="cpu")],
    ),
    "tells no figures of its memory": (
        instead(load, "check_device", lambda device: None, estimated("mps")), [estimated("cpu"), estimated()],
    ),
    "use all, and freeze parameters by their names": (
        lambda: prefix.train_only(Quadratic(), "top:1"), [after(lambda: prefix.train_only(Quadratic(), "all"), frozen(True))],
    ),
    "needs a causal language model, but": (
        scheme("prefix", lambda: tiny_random("bert")),
        [scheme(name, lambda: tiny_random("bert")) for name in ("lora", "ia3")],
    ),
    "needs keys and values of one shape": (
        scheme("prefix", lambda: tiny_random("mamba")),
        [
            scheme("prompt", lambda: tiny_random("mamba")),
            scheme("lora", lambda: tiny_random("mamba"), target_modules=["in_proj", "x_proj"]),
        ],
    ),
    "names no output head": (scheme("head", headless), [scheme("full", headless), scheme("lora", headless)]),
    "are active together, and one is saved": (
        adapters(), [adapters(lambda model: model.set_adapter("first")), adapters(merge)],
    ),
    "peft cannot apply scheme": (
        scheme("lora", lambda: tiny_random("llama"), target_modules=["c_attn"]),
        [scheme("lora", lambda: tiny_random("llama"), target_modules=["q_proj"]), scheme("ia3", lambda: tiny_random("llama"))],
    ),
    "unknown shape": (
        lambda: shapes.shape_config("opt-9b-shape"), [lambda: [shapes.shape_config(one) for one in shapes.SHAPES]],
    ),
    "unknown model type": (lambda: tiny_random("lama"), [lambda: tiny_random("llama")]),
    "is not a noise backend": (noise("cuda9"), [noise(name) for name in ("auto", "reference", *dispatch.BACKENDS)]),
    "L2L_NOISE={}, but {}; use L2L_NOISE=auto": (
        instead(dispatch, "backend_problem", lambda name: "it is not there", noise("numba")), [noise("auto")],
    ),
    "must be finite and not negative: set it": (
        of_optimizer(lambda optimizer, model: optimizer.param_groups[0].update(lr=float("nan"))),
        [of_optimizer(lambda optimizer, model: optimizer.param_groups[0].update(lr=1e-4))],
    ),
    "the blocks of a zeroth-order optimizer are its model's": (
        of_optimizer(add_group), [of_optimizer(thaw), mezo(groups=[{"match": "vector", "lr": 1e-4}])],
    ),
    "would move along a basis and a shape": (both_ways("basis", "shape"), [both_ways("basis"), both_ways("shape")]),
    "holds another run": (
        after(run(), run(steps=4)), [run(steps=4, out="other"), run(), run(steps=4, overwrite=True)],
    ),
    "holds a run that read something else": (
        after(run(), run(inputs="others")), [run(inputs="others", out="other"), run(), run(inputs="others", overwrite=True)],
    ),
    "cannot be written to": (
        instead(tempfile, "TemporaryDirectory", read_only, tried("run", 0)),
        [instead(tempfile, "TemporaryDirectory", read_only, tried("other", 0))],
    ),
    "{} writes into {}: choose another --out": (locked_twice, [elsewhere, once_let_go]),
    "--overwrite true would remove the": (
        after(run(), run(overwrite=True, model="run/config.yaml")),
        [run(overwrite=True, out="other", model="run/config.yaml")],
    ),
    "a classifier finds the end of a row by the padding id": (
        encoded(task_of("good", "bad"), classifier, no_padding),
        [encoded(task_of("good", "bad"), classifier, change) for change in (its_end, its_config)],
    ),
    "asks for generated answers": (
        encoded(task_of("good", answers=("good",)), classifier),
        [encoded(task_of("good", answers=("good",)), partial(words, family)) for family in ("llama", "t5")],
    ),
    "does not say which token its decoder starts with": (
        started(lambda model: None), [started(lambda model: setattr(model.config, "decoder_start_token_id", 0))],
    ),
    "so they are no labels": (
        encoded(task_of("good", varied=True), classifier),
        [encoded(task_of("good", "bad"), classifier), encoded(task_of("good", varied=True), partial(words, "llama"))],
    ),
    "cannot generate text": (answered("bert"), [answered("llama"), answered("t5")]),
    "cannot read {} files": (
        lambda: sources.check_suffix(Path("notes.txt")),
        [lambda: [sources.check_suffix(Path(f"a{one}")) for one in sources.SUFFIXES]],
    ),
    "'doc_to_choice' has no use": (task_file(output_type="generate_until"), [task_file(ANSWERS)]),
    "'data_files' is missing; name": (
        task_file(data_files=None), [task_file(), task_file(data_files=None, dataset_path="me/reviews")],
    ),
    "give two or more to choose from": (task_file(doc_to_choice=["sad"]), [task_file(doc_to_choice=["sad", "happy"])]),
    "{} is not supported; use {}": (
        task_file(output_type="loglikelihood"), [task_file(output_type="multiple_choice"), task_file(ANSWERS)],
    ),
    "is no name; use letters": (task_file(task="a b"), [task_file(task="a_B-2.c")]),
    "is no form of loss": (task_file(form="hinge"), [task_file(form="classification"), task_file(form="lm")]),
    "have no classification loss": (
        task_file(ANSWERS, form="classification"), [task_file(ANSWERS, form="lm"), task_file(ANSWERS)],
    ),
    "must list one metric": (task_file(metric_list=[]), [task_file(metric_list=["acc"])]),
    "is not known for output_type": (
        task_file(metric_list=["bleu"]), [task_file(metric_list=[one]) for one in ("acc", "accuracy")],
    ),
    "are too few to tell rounding": (
        lambda: lr_probe.rounding(np.ones((4, 2)), 1, np.array([1e-3, 1e-2])), [probed(1e-3, 3e-3, 1e-2)],
    ),
    "the loss has no slope": (probed(1e-6, 2e-6, 4e-6, loss=in_steps), [probed(0.5, 1, 2, loss=in_steps)]),
    "try smaller epsilons": (probed(1e-2, 3e-2, 1e-1, loss=near), [probed(1e-4, 3e-4, 1e-3, loss=near)]),
    "linear_probe needs the same options": (
        baseline("linear_probe", task="world_cause"), [baseline(name, task="world_cause") for name in ("zero_shot", "icl")],
    ),
    "use zero_shot or icl": (
        baseline("linear_probe", ANSWERS), [baseline(name, ANSWERS) for name in ("zero_shot", "icl")],
    ),
    "linear_probe reads causal language models": (baseline("linear_probe", family="t5"), [baseline("zero_shot", family="t5")]),
    "compares options, and task": (
        on_answers(objective="accuracy"), [on_answers(objective=one) for one in ("f1", "exact_match", "loss")],
    ),
    "prefix_cache={} takes": (
        placed("memory", 5000),
        [placed("disk", 5000, disk=9000), placed("auto", 5000, disk=11_000), placed("memory", 500)],
    ),
    "{} exists and is not an empty directory: choose another --out": (
        after(taken, replayed(out="taken")), [replayed(out="other")],
    ),
    "is damaged at step": (damaged, [replayed(to="1", out="other")]),
    "the blocks of {} are not known here": (
        pickled("out"),
        [pickled("out", model="model"), lambda: [published.known_config(one) for one in published.KNOWN_MODELS]],
    ),
    "{} exists and is no empty directory: choose another --out": (
        after(taken, pickled("taken", model="model")), [pickled("other", model="model")],
    ),
    "the curvature normalizer has no {}": (
        lambda: CurvatureNormalizer().costs(list(Blocks.of(Quadratic())), False),
        [
            lambda: CurvatureNormalizer({"matrix": 1.0, "vector": 2.0}).costs(list(Blocks.of(Quadratic())), False),
            lambda: EnergyNormalizer().costs(list(Blocks.of(Quadratic())), False),
        ],
    ),
    "offload=True keeps layers in the host's memory": (
        config(offload=True), [config(offload=True, device="cuda"), config()],
    ),
    "no run is given: name": (reported(), [reported("run", weights=False)]),
    "give one, as in --out report.html": (
        reported("run", out="run/summary.json"), [reported("run", weights=False, out="report.html")],
    ),
    "give the --out directory of a run": (reported("gone"), [reported("run", weights=False)]),
    "is not here: give its directory with --model": (
        reported("run", model="gone", examples=1), [reported("run", model="l2l/tiny", examples=1)],
    ),
    "a run of l2l fine-tune, of which reports": (
        after(run(), lambda: (Path("run/metrics.csv").write_text("step\n"), reported("run")())),
        [lambda: (shutil.rmtree("run"), reported("run", weights=False)())],
    ),
    "are not read: save the table": (
        saved_as("a.xlsx", ""), [saved_as("a.csv", "a,b\n1,2"), saved_as("a.json", '[{"a": 1, "b": 2}]')],
    ),
    "holds binary data and no text: save": (saved_as("a.csv", "a,b\0"), [saved_as("a.csv", "a,b\n1,2")]),
    "or an answer: name it by --label": (table(text=["text", "kind"]), [table(label="kind")]),
    "looks like a text: name it by --text": (
        lambda: init.guess(init.Frame([{"a": n, "b": n % 2} for n in range(9)], [])),
        [lambda: init.guess(init.Frame([{"a": n, "b": n % 2} for n in range(9)], []), ["a"])],
    ),
    "or name other columns by --text and --label": (table(label="mood"), [table(label="kind", text=["text"])]),
    "is there already: {}": (
        after(table(label="kind"), table(label="kind")),
        [table(label="kind", name="others"), table(label="kind", overwrite=True)],
    ),
    "freeze these": (deeper("shape"), [deeper("shape", freeze=True), deeper("kind")]),
}  # fmt: skip

ELSEWHERE = {
    "cannot be spread over workers": "parallel/test_population.py::test_every_way_out_of_a_step_that_cannot_be_spread_is_taken",
    "and workers share directions": "parallel/test_population.py::test_every_way_out_of_a_step_that_cannot_be_spread_is_taken",
    "evaluates elsewhere than was planned": "parallel/test_data.py::test_every_method_on_two_ranks_has_the_bits_of_one_process",
    "RANK is set, and": "parallel/test_data.py::test_the_whole_environment_gives_ranks_that_reach_each_other",
    "and below WORLD_SIZE": "parallel/test_data.py::test_the_whole_environment_gives_ranks_that_reach_each_other",
    "a slow one gets more time with": "train/test_killed_ranks.py::test_a_data_parallel_rank_that_is_killed_catches_up",
    "cannot be shared by several processes": "train/test_several.py::test_what_several_ranks_cannot_run_runs_in_one_process",
    "needs several processes, and this is one": "train/test_several.py::test_a_population_of_one_process_is_refused",
    "on_bad_loss='rollback": "optim/test_bad_loss.py",
    "where it counts as exploding": "optim/test_bad_loss.py",
    "pickle": "tuners/test_hub.py",
    "a process ended in the middle of a run": "test_ways_out.py::test_a_process_that_ended_leaves_what_is_done",
    "was lost with its machine or process": (
        "experiments/test_compare_executors.py"
        "::test_a_run_that_is_lost_again_and_again_is_told_of_and_fewer_at_a_time_are_the_way_on"
    ),
    "workers were lost one after the other": (
        "train/test_workers.py::test_workers_that_are_lost_again_and_again_are_told_of_and_fewer_are_the_way_on"
    ),
    "no worker of the Ray cluster is there after": (
        "train/test_population_on_ray.py::test_workers_that_load_for_long_are_told_of_and_more_time_is_the_way_on"
    ),
    "the run takes up to": "train/test_saving.py::test_a_disk_without_room_is_refused_before_anything_is_written",
    "the disk of {} is full": "train/test_prefix_run.py::test_a_full_disk_is_one_error_and_leaves_no_half_file",
    "trains layers by budget": (
        "tuners/test_plan.py::test_layers_by_budget_and_streamed_layers_go_together_where_no_whole_pass_is_run"
    ),
    "has gone past": ("train/test_same_run.py::test_not_where_its_steps_depend_on_the_end_nor_backwards_nor_once_it_has_ended"),
    "trace='fisher' draws labels": "meta/test_meta_curvature.py::test_labels_that_cannot_be_drawn_are_refused_with_a_way_out",
    "Choose one by --label": "tuners/test_card.py::test_a_tuner_of_another_name_is_asked_for_and_a_wrong_one_refused",
    "choose by --label": "tuners/test_card.py::test_a_tuner_of_another_name_is_asked_for_and_a_wrong_one_refused",
    "the licence of this tuner is": (
        "tuners/test_hub.py::test_a_tuner_of_unknown_licence_is_not_passed_on_unless_the_licence_is_named"
    ),
    "no checkpoint is left": "test_ways_out.py::test_a_folder_of_a_run_is_left_alone_and_another_one_is_taken",
    "choose another --out": "test_ways_out.py::test_a_folder_of_a_run_is_left_alone_and_another_one_is_taken",
    "is sharded, and shards are moved where they lie": (
        "params/test_shards.py::test_what_shards_cannot_do_is_refused_and_every_way_out_leads_out"
    ),
    "needs whole blocks, and each process holds a part": (
        "params/test_shards.py::test_what_shards_cannot_do_is_refused_and_every_way_out_leads_out"
    ),
    "takes derivatives, and offloaded layers": (
        "params/test_offload.py::test_what_cannot_be_offloaded_is_refused_and_every_way_out_leads_out"
    ),
    "offloaded layers have no backward pass: run": (
        "params/test_offload.py::test_what_cannot_be_offloaded_is_refused_and_every_way_out_leads_out"
    ),
    "has no memory: a device_map": (
        "params/test_device_map.py::test_layers_that_are_trained_may_not_and_the_way_out_leads_out"
    ),
    "is placed as": "params/test_shards.py::test_two_kinds_of_parallelism_go_together_along_different_dimensions",
    "the tuner says that its model is": "tuners/test_hub.py::test_a_tuner_whose_model_is_a_directory_is_not_pushed",
    **dict.fromkeys(
        (
            "optimizer_cls_and_kwargs makes a first-order optimizer",
            "optimizers holds {}, which needs gradients",
            "both optimizers and zo choose the optimizer",
            "goes backward: use transformers' own Trainer",
            "means nothing without lr='auto'",
            "torch_compile=True needs weights that are perturbed in place",
        ),
        "integrations/test_trainer.py::test_the_ways_out_of_what_is_refused_lead_out",
    ),
    "devices in one process would be nn.DataParallel": (
        "integrations/test_processes.py::test_two_processes_step_as_one_with_two_micro_batches_to_the_last_bit_and_resume"
    ),
    "step() was given {}": "integrations/test_trainer.py::test_a_plain_trainer_with_an_optimizer_of_l2l_is_told_of_the_mixin",
}
"""A piece of the message -> the test, below ``tests``, that takes its ways out, as it has what that needs."""


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def texts_in(tree: ast.AST, named: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """The texts in a piece of code, with ``{}`` for what is filled in, but for the texts that have a name."""
    for inner in ast.walk(tree):
        if isinstance(inner, ast.JoinedStr):
            yield "".join(filled(part, named) for part in inner.values)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def filled(part: ast.expr, named: Mapping[str, str]) -> str:
    if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
        return named.get(part.value.id, "{}")
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


def named_in(tree: ast.AST) -> dict[str, str]:
    """The texts that have a name of their own in a module, as a way out that several messages share."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            for target, text in zip(map(ast.unparse, node.targets), texts_in(node.value, found), strict=False):
                found[target] = text if found.get(target, text) == text else "{}"
    return found


def texts() -> Iterator[str]:
    """All texts of the package, docstrings among them."""
    for tree in trees():
        yield from texts_in(tree)


@cache
def messages() -> list[str]:
    return list(templates())


def templates() -> Iterator[str]:
    """The templates of all messages of errors that the package raises."""
    for tree in trees():
        named = named_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and (found := list(texts_in(node.exc, named))):
                yield max(found, key=len)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of libraries, about tiny models
@pytest.mark.parametrize("piece", CASES)
def test_the_ways_out_of_an_error_lead_out(piece, here):
    wrong, ways = CASES[piece]
    said = (ValueError, TypeError, FloatingPointError, BlockingIOError, FileNotFoundError)
    with pytest.raises(said, match=re.escape(piece).replace(r"\{\}", ".*")):
        wrong()
    for way in ways:
        way()


class Killed(Future[Any]):
    """Stands in for the processes of a comparison, of which one is killed: in this process, after so many runs."""

    left = 1

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __enter__(self) -> Killed:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, work: Any, trial: runner.Trial) -> Future[Any]:
        future, Killed.left = Future[Any](), Killed.left - 1
        if Killed.left < 0:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(runner.run_trial(trial))
        return future


@pytest.mark.filterwarnings("ignore")
def test_a_process_that_ended_leaves_what_is_done(here, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Killed)
    given: dict[str, Any] = {"methods": ["mezo"], "passes": 2, "processes": 2}
    with pytest.raises(ValueError, match="the same command continues; with fewer --processes each has more"):
        compare.run_comparison(comparison(**given))
    Killed.left = 2
    compare.run_comparison(comparison(**{**given, "processes": 1}))
    assert Killed.left == 0, "the run that was done is not repeated"


def finished() -> None:
    RunDirectory("run", {"steps": 3, "out": "run"}).create().finish({})


def broken() -> None:
    """A run both of whose checkpoints are damaged."""
    after(run(), run())()
    for file in Path("run").glob("*.safetensors"):
        file.write_bytes(b"nothing")
    RunDirectory("run", {"steps": 3, "out": "run"}).read_checkpoint()


FOLDERS: dict[str, Call] = {
    "is not a directory: choose another --out": after(lambda: Path("run").write_text(""), run()),
    "holds files that no run wrote: choose another --out": after(lambda: taken("run"), run()),
    "cannot be made: .*: choose another --out": after(lambda: Path("file").write_text(""), run(out="file/run")),
    "holds this run, finished: choose another --out, or pass --overwrite true": after(finished, run()),
    "no checkpoint is left: .*; choose another --out, or pass --overwrite true to begin again": broken,
}


@pytest.mark.parametrize("said", FOLDERS)
def test_a_folder_of_a_run_is_left_alone_and_another_one_is_taken(said, here):
    with pytest.raises(ValueError, match=said):
        FOLDERS[said]()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    run(out="other")()
    assert all(path.read_bytes() == content for path, content in before.items())
    if "--overwrite" in said:
        run(overwrite=True)()


def test_every_message_that_advises_has_a_case():
    known = {*CASES, *ELSEWHERE}
    without = [text for text in messages() if ADVICE.search(text) and not any(piece in text for piece in known)]
    assert not without, "an advice that no test takes: give it a case"


def test_no_case_is_of_a_message_or_a_test_that_is_gone():
    all_messages = messages()
    assert not [piece for piece in {*CASES, *ELSEWHERE} if not any(piece in text for text in all_messages)]
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}" in (PACKAGE.parent / "tests" / file).read_text(), place


def test_no_advice_begins_with_what_destroys_work():
    first = re.compile(
        r"[:;,.] (?:(?:pass )?--overwrite true|(?i:remove|delete) (?:the|that|this) (?:file|folder|directory|run))"
    )
    for text in messages():
        found = first.search(text)
        assert found is None or ADVICE.search(text[: found.start()]), text


def test_every_option_that_a_message_names_is_one_of_a_command():
    known = {"config", "debug", "help", "version"}
    for command in cli.COMMANDS.values():
        if command.config:
            known |= {field.name for field in fields(cli._imported(command, command.config))}
    of_others = {"repo-type", "nproc_per_node"}  # of `hf download`, and of torchrun
    for text in texts():
        for name in re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", text):
            assert name in of_others or name.replace("-", "_") in known, text
