"""Kind A12: an advice that loops. Every way out that an error prints is taken: the error is provoked, its advice is run.

A message is known by a piece of its template. The rule test reads all messages of the package: one that advises (an option
with ``--``, or ``pass``, ``use``, ``set``, ``choose``, ``try``) must have a case in :data:`CASES`, or be among
:data:`ELSEWHERE`, whose ways out another test takes. Those of :data:`OPEN` are older than the rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Quadratic

import l2l
from l2l import costs, optim
from l2l.experiments.spec import Contender
from l2l.meta.config import MetaTrainConfig, with_defaults
from l2l.methods.registry import build_method
from l2l.models.shapes import tiny_random
from l2l.optim import ZOOptimizer
from l2l.params import Blocks
from l2l.report.run_directory import RunDirectory
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import prepare_fine_tuning

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
        found = tuner() if callable(tuner) else l2l.Tuner.from_pretrained(tuner)
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


TOP = {"train_layers": "top:1"}
CASES: dict[str, tuple[Call, list[Call]]] = {
    # a piece of the message: (what it is said of, what it advises)
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
}  # fmt: skip

ELSEWHERE: dict[str, str] = {
    "on_bad_loss='rollback": "tests/optim/test_bad_loss.py",
    "where it counts as exploding": "tests/optim/test_bad_loss.py",
    "pickle": "tests/tuners/test_hub.py: reading pickles",
}
"""A piece of the message -> the test that takes its ways out."""

OPEN = frozenset(
    """
    the closure's value carries no derivative
    no candidate has runs that ended at every budget
    is held out: choose plans on tasks of the pool
    has no recorded learning rates
    executor: ray needs Ray
    a process ended in the middle of a run
    would choose among {} step sizes
    there is nothing to choose from
    no weight matrix belongs to an nn.Linear
    trace='fisher' draws labels
    hybrid needs the gradient
    compile needs a C++ compiler
    head is {}
    quantize is {}
    freezes the weights that scheme 'full' trains
    train_layers={}, but {}
    needs a causal language model, but
    needs keys and values of one shape
    names no output head
    peft cannot apply scheme
    unknown shape
    unknown model type
    is not a noise backend
    {}={}, but {}; use {}=auto
    would move along a basis and a shape
    choose another --out
    asks for generated answers
    does not say which token its decoder starts with
    so they are no labels
    cannot generate text
    cannot read {} files
    'doc_to_choice' has no use
    field 'data_files' is missing
    give two or more to choose from
    {} is not supported; use {}
    is no name; use letters
    is no form of loss
    have no classification loss
    must list one metric
    is not known for output_type
    is not measured; use cpu
    use cpu or cuda
    use cpu
    leave --device out for the CPU
    are too few to tell rounding
    the loss has no slope
    try smaller epsilons
    linear_probe needs the same options
    linear_probe reads causal language models
    compares options, and task
    prefix_cache={} takes
    the disk of {} is full
    trains layers by budget
    Choose one by --label
    choose by --label
    the blocks of {} are not known here
    the tuner says that its model is
    but not {}: freeze these
    """.strip().splitlines()
)
"""Pieces of messages that stood before this rule, whose ways out no case takes yet. The list may only shrink."""
KNOWN_OPEN = 58


def messages() -> Iterator[str]:
    """The templates of all messages of errors that the package raises, with ``{}`` for what is filled in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                texts = [
                    "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in inner.values)
                    if isinstance(inner, ast.JoinedStr)
                    else str(inner.value)
                    for inner in ast.walk(node.exc)
                    if isinstance(inner, ast.JoinedStr) or (isinstance(inner, ast.Constant) and isinstance(inner.value, str))
                ]
                if texts:
                    yield max(texts, key=len)


@pytest.mark.parametrize("piece", CASES)
def test_the_ways_out_of_an_error_lead_out(piece):
    wrong, ways = CASES[piece]
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=re.escape(piece).replace(r"\{\}", ".*")):
        wrong()
    for way in ways:
        way()


def test_a_folder_of_a_run_is_left_alone_and_another_one_is_taken(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path):
        with pytest.raises(ValueError, match="choose another --out"):
            RunDirectory(out, {"out": str(out)})
    assert RunDirectory(tmp_path / "other", {"out": "x"}).create().path.is_dir()


def test_every_message_that_advises_has_a_case():
    known = {*CASES, *ELSEWHERE, *map(str.strip, OPEN)}
    without = [text for text in messages() if ADVICE.search(text) and not any(piece in text for piece in known)]
    assert not without, "an advice that no test takes: give it a case"


def test_no_case_is_of_a_message_that_is_gone_and_the_open_ones_get_fewer():
    all_messages = list(messages())
    gone = [piece for piece in {*CASES, *map(str.strip, OPEN)} if not any(piece in text for text in all_messages)]
    assert not gone
    assert len(OPEN) <= KNOWN_OPEN
