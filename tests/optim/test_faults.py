"""Five hundred faults at random places of a step leave theta at a step boundary, and the optimizer agrees with it.

Issue 16, *it is done when*. A placement draws a method, how weights are held and moved, a policy for bad losses, and a fault:

- an evaluation raises, or gives NaN or inf;
- memory runs out: any operation of torch that allocates fails, in the noise, in a copy of a weight, in an update, in the model;
- a noise kernel fails before it has written;
- a signal arrives, SIGINT or a SIGTERM whose handler exits, at any line of the package that a step runs;
- something raises between the parts of a step: a hook, the choice of a direction, the judge of the losses, the update's begin.

After it theta is where the step began or where it ended: to the bit at its end, and where evaluations read copies; within the
roundings of the way back (``TOLERANCE``) where weights were perturbed in place. Step, method state, masters, curvature and
counts of bad losses are those of that boundary, and the next steps are those of a run that was never disturbed.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import METHODS, PROBLEMS, STEPPED, Problem, farthest, named, optimizer_for, same_bits, weights
from daily import daily_slice
from torch.utils._python_dispatch import TorchDispatchMode

import l2l
from l2l.bad_loss import StepCheck
from l2l.methods.registry import build_method
from l2l.noise import dispatch, native, reference
from l2l.optim import ZOOptimizer

pytestmark = pytest.mark.in_turn

PLACEMENTS, TOGETHER = 500, 10
TOLERANCE = 2e-6
"""Of weights up to 4 in size, whose spacing is at most 2.4e-7: a few walks, and one rounding for each."""
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError, ValueError)
KINDS = ("closure", "value", "allocation", "kernel", "signal", "between")
FIRST_ORDER = ({"name": "adamw"}, {"name": "sgd", "momentum": 0.9})
PACKAGE = str(Path(l2l.__file__).parent)
COUNTS: Counter[str] = Counter()


@dataclass
class Placement:
    """Everything that a placement has drawn."""

    number: int
    problem: Problem
    method: Any
    held: str
    kind: str
    error: type[BaseException]
    options: dict[str, Any]
    warm_up: int
    fused: bool
    backend: str
    where: float
    """Of the events of its kind in the step."""
    at: str = ""

    @staticmethod
    def drawn(number: int) -> Placement:
        """The placement of that number, which is its seed."""
        draw = random.Random(number)
        held = draw.choice(("in_place", "in_place", "functional", "master", "stochastic"))
        options: dict[str, Any] = {"perturb": "functional"} if held == "functional" else {}
        if held in ("master", "stochastic"):
            options["update"] = held
        kind, method = KINDS[number % len(KINDS)], draw.choice(METHODS)
        if draw.random() < 0.06 and held != "stochastic":
            method = draw.choice(FIRST_ORDER)
        elif draw.random() < 0.2:
            method = draw.choice(STEPPED)
            options["lr"] = "auto"
        options["on_bad_loss"] = draw.choice(("raise", "skip", "clip", "rollback:2"))
        options["weight_decay"] = draw.choice((0.0, 0.0, 0.1))
        problem = draw.choice((PROBLEMS[0], PROBLEMS[-1]))
        fused, backend = draw.random() < 0.3, draw.choice(("auto", "auto", "reference"))
        error = draw.choice(ERRORS[:2] if kind in ("allocation", "kernel") else ERRORS)
        return Placement(
            *(number, problem, method, held, kind, error, options, draw.randrange(6), fused, backend, draw.random())
        )

    def optimizer(self) -> tuple[torch.nn.Module, ZOOptimizer]:
        """Its model and optimizer, before the first step."""
        model = self.problem.make()
        model = model if self.held in ("in_place", "functional") else model.bfloat16()
        options = {**self.options, "seed": self.number}
        if isinstance(self.method, dict):
            args = {name: value for name, value in self.method.items() if name != "name"}
            options |= {"lr": 1e-3}
            return model, ZOOptimizer(model, build_method(self.method["name"], 1e-3, args, None, model), **options)
        if "lr" in options:
            return model, ZOOptimizer(model, self.method.make(model), **options)
        return model, optimizer_for(self.method, model, self.problem, **options)

    def __str__(self) -> str:
        method = self.method if isinstance(self.method, dict) else named(self.method)
        told = f"{self.problem.name}, {method}, {self.held}, {self.options}, step {self.warm_up}"
        more = f"{' fused' * self.fused}, {self.backend}: {self.kind} {self.error.__name__} {self.at}"
        return f"placement {self.number}: {told}{more}"


@dataclass
class Faults:
    """Counts the events of a kind, and makes the one with the chosen number fail."""

    placement: Placement
    chosen: int | None = None
    seen: int = 0
    places: list[str] = field(default_factory=list)

    def event(self, place: str) -> None:
        """An event at a place; raises where it is the chosen one."""
        number, self.seen = self.seen, self.seen + 1
        if self.chosen is None:
            self.places.append(place)
        elif number == self.chosen:
            raise self.placement.error(f"out of something at {place}")

    @contextmanager
    def armed(self, optimizer: ZOOptimizer) -> Iterator[None]:
        """Inside, events are counted."""
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if self.placement.kind == "allocation":
                stack.enter_context(Allocations(self))
            elif self.placement.kind == "kernel":
                for module, name in ((native, "run_plans"), (reference, "add_noise")):
                    patch.setattr(module, name, self.before(getattr(module, name), name))
            elif self.placement.kind == "signal":
                stack.enter_context(self.lines())
            elif self.placement.kind == "between":
                kind: Any = type(optimizer.method)
                patch.setattr(kind, "update_", self.before(kind.update_, "update"))
                patch.setattr(StepCheck, "judge", self.before(StepCheck.judge, "judge"))
                if isinstance(optimizer.method, l2l.methods.base.Method):
                    patch.setattr(kind, "direction", self.before(kind.direction, "direction"))
                hooks = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
                for number, register in enumerate(hooks):
                    stack.callback(register(lambda *_, number=number: self.event(f"hook {number}")).remove)
            yield

    def before(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        """The function, an event before it."""

        def counted(*args: Any, **named: Any) -> Any:
            self.event(place)
            return function(*args, **named)

        return counted

    @contextmanager
    def lines(self) -> Iterator[None]:
        """Every line of the package that runs is an event: a signal arrives there."""
        number = signal.SIGTERM if self.placement.error is SystemExit else signal.SIGINT
        exits = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
        before = sys.gettrace()

        def traced(frame: Any, event: str, _: Any) -> Any:
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                at, self.seen = self.seen, self.seen + 1
                if self.chosen is None:
                    self.places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                elif at == self.chosen:
                    sys.settrace(None)
                    signal.raise_signal(number)
            return traced

        try:
            sys.settrace(traced)
            yield
        finally:
            sys.settrace(before)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            signal.signal(signal.SIGTERM, exits)
            signal.signal(signal.SIGINT, interrupts)


class Allocations(TorchDispatchMode):
    """Every operation that gives a tensor in memory of its own is an event."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.faults = faults

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        own = [one for one in schema.returns if "Tensor" in str(one.type) and one.alias_info is None]
        if own and not schema.is_mutable:
            self.faults.event(schema.name)
        return func(*args, **(kwargs or {}))


@dataclass
class Boundary:
    """Model and optimizer between two steps."""

    model: torch.nn.Module
    optimizer: ZOOptimizer

    @staticmethod
    def of(model: torch.nn.Module, optimizer: ZOOptimizer) -> Boundary:
        """A copy."""
        return Boundary(*copy.deepcopy((model, optimizer)))

    def compare(self, model: torch.nn.Module, optimizer: ZOOptimizer, exact: bool) -> None:
        """Assert that model and optimizer are here."""
        expected, found = weights(self.model), weights(model)
        if exact:
            assert same_bits(expected, found), f"weights differ by {farthest(expected, found)}"
        assert farthest(expected, found) <= TOLERANCE, "weights are at no boundary"
        assert optimizer.theta.displacement.restored
        mine, theirs = self.optimizer, optimizer
        assert alike(mine.theta.extra_state(), theirs.theta.extra_state()), "masters"
        assert alike(l2l.optim._plain(mine.method_state), l2l.optim._plain(theirs.method_state)), "method state"
        for name in ("steps_done", "curvature_lr_state", "bad_losses"):
            assert repr(getattr(mine, name)) == repr(getattr(theirs, name)), name
        assert len(mine._copies) == len(theirs._copies), "copies of a rollback"


def alike(left: Any, right: Any) -> bool:
    """Equal to the bit."""
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[name], right[name]) for name in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(alike, left, right))
    return repr(left) == repr(right) if not hasattr(left, "vectors") else True


@contextmanager
def computed_by(backend: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, dispatch.VARIABLE, backend)
        yield


def stepped(model: torch.nn.Module, optimizer: ZOOptimizer, faults: Faults | None = None) -> None:
    """One step; of the kinds "closure" and "value", evaluations are the events."""

    def closure() -> torch.Tensor:
        if faults is not None and faults.placement.kind == "closure":
            faults.event("an evaluation")
        loss = model().float()
        if faults is not None and faults.placement.kind == "value":
            at, faults.seen = faults.seen, faults.seen + 1
            if at == faults.chosen:
                return loss * (float("nan") if faults.placement.number % 4 == 1 else float("inf"))
        return loss

    if faults is None:
        optimizer.step(closure)
        return
    with faults.armed(optimizer):
        optimizer.step(closure)


def run(placement: Placement) -> str:
    """Where theta was found: where the step "began" or "ended"; or the step was "dropped"."""
    model, optimizer = placement.optimizer()
    for _ in range(placement.warm_up):
        stepped(model, optimizer)
    begun = Boundary.of(model, optimizer)
    fused = [Boundary.of(model, optimizer) for _ in range(2 * placement.fused)]
    for _ in range(placement.fused):  # the one before the fault: its moves wait
        stepped(begun.model, begun.optimizer)
    ended = Boundary.of(begun.model, begun.optimizer)
    stepped(ended.model, ended.optimizer)

    counting = Faults(placement)
    one = fused[0] if placement.fused else Boundary.of(model, optimizer)
    with one.optimizer.theta.fused_steps() if placement.fused else nullcontext():
        for _ in range(placement.fused):
            stepped(one.model, one.optimizer)
        stepped(one.model, one.optimizer, counting)
    if not counting.seen:  # no kernel: another fault instead
        assert placement.kind == "kernel"
        placement.kind = "allocation"
        return run(placement)
    chosen = int(placement.where * counting.seen)
    faults = Faults(placement, chosen)
    if counting.places:
        placement.at = f"{chosen} of {counting.seen}, {counting.places[chosen]}"

    raised: BaseException | None = None
    with optimizer.theta.fused_steps() if placement.fused else nullcontext():
        for _ in range(placement.fused):
            stepped(model, optimizer)
        try:
            stepped(model, optimizer, faults)
        except (*ERRORS, FloatingPointError) as error:
            raised = error
    did = optimizer.steps_done - begun.optimizer.steps_done
    exact = placement.held != "in_place"
    if placement.kind == "value" and placement.options["on_bad_loss"] != "raise":
        assert raised is None and did == 1 and optimizer.bad_losses.nonfinite == 1
        return dropped(placement, begun, model, optimizer, exact)
    assert raised is not None, "the fault was swallowed"
    assert did in (0, 1)
    boundary = (begun, ended)[did]
    exact |= did == 1 and not placement.fused  # along shapes, fused steps are those of separate ones within roundings
    boundary.compare(model, optimizer, exact)
    goes_on(boundary, model, optimizer)
    return ("began", "ended")[did]


def dropped(placement: Placement, begun: Boundary, model: torch.nn.Module, optimizer: ZOOptimizer, exact: bool) -> str:
    """The step was left out: all is where it began, or some steps before, but for the counts."""
    expected = begun
    if placement.options["on_bad_loss"] == "rollback:2":
        before = max(0, begun.optimizer.steps_done - 2)
        expected, exact = Boundary(*placement.optimizer()), True
        for _ in range(before):
            stepped(expected.model, expected.optimizer)
        begun.optimizer._copies = []
    expected.optimizer.steps_done = optimizer.steps_done
    expected.optimizer.bad_losses, expected.optimizer._copies = optimizer.bad_losses, optimizer._copies
    expected.compare(model, optimizer, exact)
    goes_on(expected, model, optimizer)
    return "dropped"


def goes_on(boundary: Boundary, model: torch.nn.Module, optimizer: ZOOptimizer) -> None:
    """The next steps are those of the boundary, to the bit, from the same weights."""
    with torch.no_grad():
        for own, other in zip(boundary.model.parameters(), model.parameters(), strict=True):
            if not torch.equal(own, other):
                own.copy_(other)
    for _ in range(3):
        stepped(boundary.model, boundary.optimizer)
        stepped(model, optimizer)
    boundary.compare(model, optimizer, exact=True)


@pytest.fixture(scope="module", autouse=True)
def told(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints the counts, captured or not."""
    yield
    capture: Any = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{sum(COUNTS.values())} fault placements: " + ", ".join(f"{n} {what}" for what, n in sorted(COUNTS.items())))


@pytest.mark.filterwarnings("ignore:the closure", "ignore:no loss has changed")
@pytest.mark.parametrize("first", daily_slice(range(0, PLACEMENTS, TOGETHER), 3))
def test_a_fault_at_any_place_of_a_step_leaves_theta_at_a_boundary(first: int):
    wrong = []
    for number in range(first, first + TOGETHER):
        placement = Placement.drawn(number)
        try:
            with computed_by(placement.backend):
                COUNTS[run(placement)] += 1
        except Exception as error:
            wrong.append(f"{placement}: {type(error).__name__} {error}")
    assert not wrong, "\n".join(wrong)
