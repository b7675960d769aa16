"""The inner step of every loop, :func:`zo_step`, and the torch optimizer around it: :class:`ZOOptimizer`.

``lr="auto"`` sets the learning rate from curvature: lr = fraction / mean(curvature along u), where the step of a parabola
along u is 1 / curvature times the projected gradient. Losses in another unit, a longer u or another model change the curvature
as they change the step, so the fraction is a pure number. What the closure returns decides how both are found:

- Logits, or losses per example: the curvature is that of Gauss and Newton, u^T G u >= 0, and the share of the signal in the
  squared projected gradient, s = G / (G + noise / b), sets the fraction. Both come from the evaluations that are made anyway
  (:func:`l2l.estimators.directional_statistics`).
- A scalar: with L+ and L- at theta +- epsilon u and L0 at theta, all on one batch, (L+ + L- - 2 L0) / epsilon^2 is u^T H u up
  to O(epsilon^2), and exactly on a quadratic. Some steps evaluate the third loss, and the fraction is fixed.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch.autograd import forward_ad
from torch.optim import Optimizer

from l2l.arguments import plain
from l2l.bad_loss import BadLosses, Policy, StepCheck, dropped
from l2l.estimators import (
    BadLoss,
    BatchOutputs,
    Closure,
    ClosureValue,
    DirectionalStatistics,
    Estimate,
    MicroBatched,
    center_loss,
    directional_statistics,
    loss_along,
    loss_of,
    pieces_of,
    summed_gradients,
    two_point,
)
from l2l.methods import base
from l2l.models.offload import stream_of
from l2l.noise import Key
from l2l.params import Block, Blocks, PerturbedParameters
from l2l.params.blocks import Attachment
from l2l.params.parameters import check_factors
from l2l.params.shards import is_shard, reshard
from l2l.report.memory import available_bytes

LearningRate: TypeAlias = float | Literal["auto"]
"""A number, or ``auto``: step_fraction over the curvature."""
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class CurvatureLR:
    """When curvature is measured for ``lr="auto"``, and how the learning rate follows from it.

    Raises:
        ValueError: a value out of range.
    """

    step_fraction: float | None = None
    """The fraction of the step to the minimum of the parabola along u. None: ``signal_gain`` times the measured share of the
    signal, and 0.1 where the closure returns a scalar, of which no share is known. Torch schedulers act on it: it is the ``lr``
    of the parameter groups, 0.1 where it is None."""
    signal_gain: float = 0.5
    """What the share of the signal is multiplied by: below 1, as the curvature that is met later is larger than the mean."""
    every: int = 5
    """Steps from one third loss to the next, where the closure returns a scalar: a step takes 1 / every more forward passes on
    average. Outputs are read at each step, and averaged over as many steps."""
    warm_up: int = 5
    """First steps, at each of which it is measured, so that the average soon rests on several measurements."""
    needed: int = 3
    """Measurements before theta first moves: until then the rate is 0. One alone is close to 0 now and then, where valley and
    ridge cancel along u, and a step by it would end the run. The parameters first move at step 2."""
    decay: float = 0.9
    """Factor of the average at each measurement. After many, the rate grows by at most 1 / decay from one measurement to
    the next, whatever is measured."""
    resolution: float = 2.0**-21
    """Relative rounding error of a loss: a few roundings in float32. The curvature that it could produce by itself,
    resolution * |loss| / epsilon^2, is a lower bound, so that flat losses cannot make the rate explode."""

    def __post_init__(self) -> None:
        base.check_positive(step_fraction=self.nominal, signal_gain=self.signal_gain)
        base.check_counts(every=self.every, needed=self.needed)
        if not isinstance(self.warm_up, int) or isinstance(self.warm_up, bool) or self.warm_up < 0:
            raise ValueError(f"warm_up={self.warm_up} must be a whole number, at least 0")
        for name in ("decay", "resolution"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")

    @property
    def nominal(self) -> float:
        """The fraction that parameter groups have as ``lr`` in the beginning."""
        return NOMINAL_FRACTION if self.step_fraction is None else self.step_fraction

    def due(self, step: int) -> bool:
        """Whether a third loss is evaluated at step ``step``, counted from 0; at the first step it always is."""
        return step < self.warm_up or step % self.every == 0

    def rates(self, fractions: Sequence[float], state: "CurvatureLRState") -> tuple[float, ...]:
        """:func:`learning_rate` of each block; 0 as long as more measurements are needed."""
        if state.count < self.needed:
            return (0.0,) * len(fractions)
        share = state.signal_share if self.step_fraction is None else None
        factor = 1.0 if share is None else self.signal_gain * share / self.nominal
        return tuple(learning_rate(factor * own, state) for own in fractions)


NOMINAL_FRACTION = 0.1
"""Fraction of the step to the minimum of the parabola where nothing is known of the noise."""
LEAST_SIGNAL = 0.002
"""Least ratio of the signal to the curvature along a direction that is taken as measured: the mean of a few hundred products
of derivatives may be 0 or negative by chance. The ratio is a pure number for cross entropy, whose curvature is the noise's
size."""


@dataclass(frozen=True)
class CurvatureLRState:
    """The running mean of curvature, as a weighted sum and the sum of the weights."""

    total: float = 0.0
    weight: float = 0.0
    count: int = 0
    """Measurements in it."""

    signal: float = 0.0
    noise: float = 0.0
    """Weighted sums of signal and of noise / b; see :class:`l2l.estimators.DirectionalStatistics`."""
    from_outputs: bool = False
    """Whether the last measurement was read from outputs: no third loss is then needed."""

    @property
    def average(self) -> float:
        """Mean curvature; 0 before the first measurement."""
        return self.total / self.weight if self.weight else 0.0

    @property
    def signal_share(self) -> float | None:
        """s = G / (G + noise / b) of the means; None where the noise is not known."""
        if not (self.from_outputs and self.noise > 0):
            return None
        signal = max(self.signal, LEAST_SIGNAL * self.total)
        return signal / (signal + self.noise)


def curvature(
    loss_plus: float, loss_minus: float, loss_center: float, epsilon: float, resolution: float = CurvatureLR.resolution
) -> float:
    """|u^T H u| from losses at theta + epsilon u, theta - epsilon u and theta; at least what their rounding could produce.

    It is 0 only where all three losses are.

    Raises:
        FloatingPointError: epsilon is so small that it overflows.
    """
    rounding = resolution * max(abs(loss_plus), abs(loss_minus), abs(loss_center))
    bend = abs((loss_plus - loss_center) + (loss_minus - loss_center))
    value = max(bend, rounding) / epsilon / epsilon
    if not math.isfinite(value):
        raise FloatingPointError(f"the curvature overflows at epsilon={epsilon}: use a larger epsilon")
    return value


def least_curvature(measured: float, loss: float, epsilon: float, resolution: float) -> float:
    """A curvature from outputs, at least what the rounding of outputs of the loss's size could produce.

    Raises:
        FloatingPointError: it is not finite.
    """
    value = max(measured, (resolution * abs(loss) / epsilon) ** 2)
    if not math.isfinite(value):
        raise FloatingPointError(f"the curvature from the outputs is {value}: use a larger epsilon={epsilon}, or lower lr")
    return value


def update_average(state: CurvatureLRState, measured: float, decay: float, seen: Sequence[float] = ()) -> CurvatureLRState:
    """The state with one more measurement in its means; ``seen``: signal and noise / b, where it was read from outputs."""
    signal, noise = seen or (0.0, 0.0)
    now = (measured, 1.0, signal, noise)
    before = (state.total, state.weight, state.signal, state.noise)
    total, weight, signals, noises = (decay * a + (1 - decay) * b for a, b in zip(before, now, strict=True))
    return CurvatureLRState(total, weight, state.count + 1, signals, noises, bool(seen))


def learning_rate(step_fraction: float, state: CurvatureLRState) -> float:
    """The learning rate: step_fraction over the mean curvature. It is 0 until a curvature is known."""
    return step_fraction / state.average if state.average else 0.0


def curvature_lr_state(control: CurvatureLR | None, state: CurvatureLRState) -> dict[str, dict[str, Any]] | None:
    """Settings and state of ``lr="auto"`` as plain values; None where there are none."""
    return None if control is None else {"settings": asdict(control), "seen": asdict(state)}


def schedule_factor(schedule: Schedule, progress: float, end: float = 0.0) -> float:
    """What the learning rate is multiplied by at ``progress`` (0 to 1) through a run.

    ``constant``: 1. ``linear`` and ``cosine`` fall from 1 to ``end``, along a line or half a cosine.
    """
    if schedule == "constant":
        return 1.0
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return end + (1 - end) * left


def check_lr(**values: LearningRate) -> None:
    """Raise ValueError, naming the first value that is neither ``"auto"`` nor positive and finite.

    A scheduled learning rate may be 0, as warm-up begins there: see :func:`check_scheduled_lr`.
    """
    for name, value in values.items():
        if isinstance(value, str):
            if value != "auto":
                raise ValueError(f"{name}={value!r} must be a number or 'auto'")
        elif value == 0:
            raise ValueError(
                f"{name}={value} would move nothing: give a positive number or 'auto'; a warm-up that begins at 0 sets it in "
                "param_groups, as torch's schedulers do"
            )
        else:
            check_scheduled_lr(name, value)


def check_scheduled_lr(name: str, value: float) -> None:
    """Raise ValueError unless the value is finite and not negative."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} must be finite and not negative: set it to such a number, or mend its schedule")


def check_schedule(schedule: str, end: float) -> None:
    """Raise ValueError where the schedule is unknown, or does not end between 0 and 1."""
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}; use one of {', '.join(get_args(Schedule))}")
    if not 0 <= end <= 1:
        raise ValueError(f"schedule_end={end} must be between 0 and 1")


@dataclass(frozen=True)
class StepReport:
    """Estimates, cost and learning rates of one step."""

    key: Key
    estimates: tuple[Estimate, ...]
    passes: int
    """Evaluations of a closure, those of searches and of curvature included; a backward pass counts as two more,
    the tangents of a forward-mode one as one more."""
    lr: tuple[float, ...]
    """Learning rate of each block, as it was used."""
    curvature: float | None
    """|u^T H u| along the first direction, where it was measured."""
    curvature_lr_state: CurvatureLRState
    """State of ``lr="auto"`` after the step."""
    loss_center: float | None = None
    """Loss at theta of a first-order step, which has no directions and so no estimates."""
    gradient_norm: float | None = None
    """Of a first-order step."""
    dropped: str = ""
    """Why the step's update was not made, under a policy of ``on_bad_loss``; ``loss_center`` then is the bad loss."""
    unfit: tuple[str, ...] = ()
    """What evaluations did that makes them unfit for the step: keys of :data:`UNFIT`."""
    evaluations: tuple[float, ...] = ()
    """The losses of the step in the order in which they were evaluated. With them and the next, a replay repeats the step."""
    readings: tuple[tuple[float, ...], ...] = ()
    """What was read from evaluations beside their losses, in turn."""

    @property
    def loss(self) -> float:
        """Mean of the losses along the directions; of a first-order step, the loss at theta; of a dropped one, the bad loss."""
        if self.loss_center is not None:
            return self.loss_center
        return sum(e.loss for e in self.estimates) / len(self.estimates)

    @property
    def projected_gradient(self) -> float:
        """Mean projected gradient; of a first-order step the norm, which is the gradient projected on itself."""
        if self.gradient_norm is not None:
            return self.gradient_norm
        return sum(e.projected_gradient for e in self.estimates) / len(self.estimates)


UNFIT = {
    "random": (
        "the closure draws random numbers, others at each evaluation, so that differences of losses are noise: call "
        "model.eval() if it has dropout, or seed them inside the closure"
    ),
    "graph": (
        "the closure returns a loss with a graph, which holds the activations of an evaluation for nothing: leave "
        "enable_grad() out of it"
    ),
    "backward": (
        "the closure calls backward(), and a zeroth-order step reads no gradients: leave backward() out, and free them with "
        "optimizer.zero_grad(); in Lightning, set automatic_optimization = False and call optimizer.step(closure) in "
        "training_step"
    ),
    "accumulate": (
        "accelerate accumulates gradients over several batches, and of these a zeroth-order step sees the last alone: set "
        "gradient_accumulation_steps to 1, and give micro-batches as l2l.estimators.MicroBatched"
    ),
}
"""What a closure may do that its loss does not show -> the warning, which names the remedy."""


@final
class Logged:
    """A closure that gives the losses, and the readings, of a step that was logged, in turn: a replay calls no model."""

    def __init__(self, losses: Sequence[float], readings: Sequence[Sequence[float]] = ()) -> None:
        self._losses, self._readings = iter(losses), iter(readings)

    def __call__(self) -> float:
        return self._next(self._losses)

    def reading(self) -> list[float]:
        """The next of the readings."""
        return list(self._next(self._readings))

    @property
    def spent(self) -> bool:
        """Whether nothing is left; asks once."""
        return next(self._losses, None) is None and next(self._readings, None) is None

    def _next(self, values: Iterator[Any]) -> Any:
        found = next(values, None)
        if found is None:
            raise ValueError("the step evaluates more often than its record says: the log is of another method or version")
        return found


class _Tape:
    """Counts the passes of the closures of a step, keeps what they give, in turn: their losses, and what is read beside; and
    notes what makes them unfit for it."""

    def __init__(self, theta: PerturbedParameters, closure: Closure) -> None:
        self._logged = closure if isinstance(closure, Logged) else None
        self.passes = 0
        self.unfit: dict[str, None] = {}
        self._device = theta.blocks[0].tensor.device
        self._drawn: list[tuple[torch.Tensor, ...]] = []  # states of the generators after the first two evaluations
        self.losses: list[float] = []
        self.readings: list[tuple[float, ...]] = []
        self._reading = False

    def __call__(self, closure: Closure) -> Closure:
        counted = self._counted(closure)

        def kept() -> ClosureValue:
            value = counted()
            if not self._reading:
                with torch.no_grad():
                    loss = loss_of(value)
                if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                    loss = loss.detach().double().item()
                if isinstance(loss, int | float):  # whoever has called refuses anything else
                    self.losses.append(float(loss))
            return value

        return replace(counted, whole=kept) if isinstance(counted, MicroBatched) else kept

    def reading(self, compute: Callable[[], Sequence[float]]) -> list[float]:
        """See :class:`l2l.methods.base.LossEvaluator`. Losses inside are no part of the record."""
        if self._logged is not None:
            found = self._logged.reading()
            if len(found) == 1 and math.isnan(found[0]):
                raise BadLoss("a loss, or what was made of it, was not finite when the step was logged")
        else:
            self._reading = True
            try:
                found = list(map(float, compute()))
            except FloatingPointError:
                self.readings.append((math.nan,))  # a replay drops the step at the same place
                raise
            self._reading = False
        self.readings.append(tuple(found))
        return found

    def _counted(self, closure: Closure) -> Closure:
        if isinstance(closure, MicroBatched):  # all pieces are one pass
            *others, last = closure.pieces
            return replace(closure, pieces=(*others, self._counted(last)), whole=None)

        def counted() -> ClosureValue:
            value = closure()
            self.passes += 1
            first = value[0] if isinstance(value, tuple) and value else value
            if isinstance(first, torch.Tensor):  # two passes more follow a graph backwards; a tangent has cost one more
                self.passes += 2 if first.requires_grad else forward_ad.unpack_dual(first).tangent is not None
                if first.requires_grad and not torch.is_grad_enabled():
                    self.unfit["graph"] = None
            if len(self._drawn) < 2:  # equal where nothing is drawn, and where the closure seeds what it draws
                on_gpu = self._device.type == "cuda"
                self._drawn.append((torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if on_gpu else [])))
                if not all(map(torch.equal, self._drawn[0], self._drawn[-1])):
                    self.unfit["random"] = None
            return value

        return counted


class _Record:
    """The outputs of a step's evaluations, by where they were made."""

    def __init__(self, theta: PerturbedParameters) -> None:
        self._theta = theta
        self._found: dict[tuple[int | None, float], BatchOutputs] = {}

    def __call__(self, closure: Closure) -> Closure:
        def recorded() -> ClosureValue:
            value = closure()
            if isinstance(value, tuple) or (isinstance(value, torch.Tensor) and value.numel() > 1):
                at = self._theta.displacement
                place = (id(at.direction), at.distance) if at.distance else (None, 0.0)
                self._found[place] = BatchOutputs.of(value)
            return value

        return replace(closure, whole=recorded) if isinstance(closure, MicroBatched) else recorded

    def statistics(self, estimates: Sequence[Estimate], epsilon: float) -> DirectionalStatistics | None:
        """Of the estimates' directions; None where the closure returns scalars, or was evaluated at other points."""
        plus, minus = ([self._found.get((id(e.direction), side)) for e in estimates] for side in (epsilon, -epsilon))
        center = self._found.get((None, 0.0))
        if any(one is None for one in plus) or (any(one is None for one in minus) and center is None):
            return None
        central = all(one is not None for one in minus)
        there, here = ([one for one in side if one is not None] for side in (plus, minus))
        return directional_statistics(center or there[0], there, here if central else None, epsilon)


@contextmanager
def _recording(tape: _Tape) -> Iterator[None]:
    """Note in the error of a bad loss the evaluations that had been made."""
    try:
        yield
    except FloatingPointError as error:
        bad = error if isinstance(error, BadLoss) else BadLoss(str(error))
        bad.passes, bad.evaluations, bad.readings = tape.passes, tuple(tape.losses), tuple(tape.readings)
        raise bad from error.__cause__


def _evaluated(theta: PerturbedParameters, closure: Closure) -> Closure:
    """The closure at the perturbed weights, in pieces if it is."""
    if isinstance(closure, MicroBatched):
        pieces = tuple(partial(theta.evaluate, piece) for piece in closure.pieces)
        return replace(closure, pieces=pieces, whole=lambda: theta.evaluate(closure))
    return lambda: theta.evaluate(closure)


def zo_step(
    closure: Closure,
    theta: PerturbedParameters,
    method: base.Method[Any],
    state: Any,
    key: Key,
    lr: Sequence[float],
    weight_decay: Sequence[float] | None = None,
    fresh: Callable[[int], Closure] | None = None,
    curvature_lr: CurvatureLR | None = None,
    curvature_lr_state: CurvatureLRState = CurvatureLRState(),
    check: Callable[[Sequence[Estimate]], tuple[Estimate, ...]] = tuple,
    left_out: Callable[[], Sequence[int]] | None = None,
) -> tuple[Any, StepReport]:
    """One step of ``method``: estimate, update, restore. Gives the method's next state and a report.

    Args:
        closure: loss or outputs on this step's batch at the present parameters; see :data:`l2l.estimators.ClosureValue`.
        lr: learning rate of each block; with ``curvature_lr``, the step fraction of each block.
        weight_decay: decay of each block: theta_b -= lr_b * decay_b * theta_b, after the update.
        fresh: ``fresh(i)`` is the loss on a further batch, for methods that search; None: always this step's.
        curvature_lr: set the learning rates to lr over the mean curvature, this step's included where it is measured.
        curvature_lr_state: from the report of the step before.
        check: gives the estimates to update by; what it raises ends the step before anything has moved.
        left_out: draws of directions that are no part of the step, as those of a population that nobody has evaluated; it is
            logged as a reading. None: all are, and nothing is logged.

    Raises:
        FloatingPointError: a loss is not finite. The parameters are back where the step began, as after any other error.
    """
    tape = _Tape(theta, closure)
    counted = tape(closure)
    record = _Record(theta)
    if curvature_lr is not None:
        counted = record(counted)

    def further(number: int) -> Closure:
        return _evaluated(theta, counted if fresh is None else tape(fresh(number)))

    with _recording(tape), theta.step():
        bend = None
        due = curvature_lr is not None and not curvature_lr_state.from_outputs and curvature_lr.due(key.step)
        absent = frozenset[int]() if left_out is None else frozenset(map(int, tape.reading(left_out)))
        evaluator = base.LossEvaluator(theta, key, counted, lambda direction: direction, tape.reading, absent)
        if isinstance(method, base.CustomEstimator) or method.estimator == "one_sided":
            estimates, state = base.run_estimator(method, evaluator, state)
        else:
            directions = base.directions_of(method, evaluator, state)
            center = center_loss(counted, theta, directions[0]) if due else None
            seen: list[Estimate] = []
            for direction in directions:  # a loop, not a comprehension: few frames lie between a step and its kernel
                seen.append(two_point(counted, theta, direction, method.epsilon))
            estimates = tuple(seen)
            if due:
                estimates = (replace(estimates[0], loss_center=center), *estimates[1:])
        estimates = check(estimates)
        if curvature_lr is not None:
            measured = tape.reading(lambda: _measured(record.statistics(estimates, method.epsilon)))
            if measured:
                loss, resolution = estimates[0].loss, curvature_lr.resolution
                bend = least_curvature(measured[0], loss, method.epsilon, resolution)
                decay = curvature_lr.decay ** (1 / curvature_lr.every)
                curvature_lr_state = update_average(curvature_lr_state, bend, decay, measured[1:])
            elif curvature_lr_state.from_outputs:  # the closure has changed: a third loss is due at the next step
                curvature_lr_state = replace(curvature_lr_state, from_outputs=False)
            elif due:
                first = _with_all_losses(evaluator, estimates[0], method.epsilon)
                estimates = (first, *estimates[1:])
                if first.loss_minus is not None and first.loss_center is not None:
                    losses = first.loss_plus, first.loss_minus, first.loss_center
                    bend = curvature(*losses, method.epsilon, curvature_lr.resolution)
                    curvature_lr_state = update_average(curvature_lr_state, bend, curvature_lr.decay)
            lr = curvature_lr.rates(lr, curvature_lr_state)
        decays = weight_decay is not None and any(weight_decay)
        factors = [1 - rate * decay for rate, decay in zip(lr, weight_decay or [], strict=True)] if decays else []
        check_factors(factors)
        context = base.StepContext(key, tuple(lr), _evaluated(theta, counted), further, bend, tape.reading)
        following = method.update_(theta, state, estimates, context)
        if decays:
            theta.shrink(factors)
    report = StepReport(key, estimates, tape.passes, tuple(lr), bend, curvature_lr_state, unfit=tuple(tape.unfit))
    return following, replace(report, evaluations=tuple(tape.losses), readings=tuple(tape.readings))


def _measured(statistics: DirectionalStatistics | None) -> list[float]:
    """Curvature of the step, signal, and noise of the batch's mean; 0 where they are not known. Empty without outputs."""
    if statistics is None:
        return []
    noise = (statistics.noise or 0.0) / len(statistics.derivatives)
    return [statistics.curvature_of_step, statistics.signal or 0.0, noise]


def _with_all_losses(evaluator: base.LossEvaluator, seen: Estimate, epsilon: float) -> Estimate:
    """The estimate with the losses that its method did not evaluate. Its direction is transformed already."""
    plus, minus, center = seen.loss_plus, seen.loss_minus, seen.loss_center
    if minus is None and plus == center and seen.projected_gradient:  # a derivative at theta; a difference would be 0
        plus = loss_along(evaluator.closure, evaluator.theta, seen.direction, epsilon)
    if minus is None:
        minus = loss_along(evaluator.closure, evaluator.theta, seen.direction, -epsilon)
    if center is None:
        center = center_loss(evaluator.closure, evaluator.theta)
    return replace(seen, loss_plus=plus, loss_minus=minus, loss_center=center)


FIRST_ORDER_PASSES = 3
"""A forward pass over the batch, and a backward pass, which counts as two more."""


def first_order_step(
    closure: Closure,
    theta: PerturbedParameters,
    method: base.FirstOrder[Any],
    state: Any,
    key: Key,
    lr: Sequence[float],
    weight_decay: Sequence[float] | None = None,
    judge: Callable[[float, float], float] = lambda loss, norm: math.inf,
) -> tuple[Any, StepReport]:
    """One first-order step: the next state and a report. Arguments are those of :func:`zo_step`.

    Args:
        judge: gives a bound of the gradient's norm from the loss and the norm; what it raises ends the step.

    Raises:
        TypeError: the closure's value carries no graph.
        FloatingPointError: loss or gradient is not finite. Nothing has moved then, nor after any other error.
    """
    with theta.step():
        theta.restore()
        pieces = (partial(theta.evaluate, piece) for piece in pieces_of(closure))
        loss, gradients = summed_gradients(pieces, theta.blocks)
        norms = [torch.linalg.vector_norm(g, dtype=base.accumulation_dtype(g.dtype)).item() for g in gradients.values()]
        norm = math.sqrt(sum(own**2 for own in norms))
        if not math.isfinite(norm):
            raise BadLoss(f"the norm of the gradient is {norm}: lower lr, or look for overflowing inputs", loss)
        if (limit := judge(loss, norm)) < norm:
            for gradient in gradients.values():
                gradient.mul_(limit / norm)
            norm = limit
        if weight_decay is not None and any(weight_decay):
            theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
        following = method.update_(theta, state, gradients, lr)
    report = StepReport(key, (), FIRST_ORDER_PASSES, tuple(lr), None, CurvatureLRState(), loss, norm)
    return following, replace(report, evaluations=(loss,))


DEFAULT_LR = 1e-6
"""Of MeZO and its kind on models of a billion parameters."""
FLAT_STEPS = 10
"""Steps in a row without any projected gradient, after which a warning is given. One may be chance where losses are counts."""
STATE = "zeroth_order"
"""Entry of ``state_dict`` that holds seed, step, step control and the method's state."""


@final
class ZOOptimizer(Optimizer):
    """A zeroth-order method as a torch optimizer: no gradients are computed or stored.

    It copies, pickles, and goes with torch's schedulers and hooks, as torch's own do. A copy has parameters of its own: copy or
    pickle it together with its model, as ``copy.deepcopy((model, optimizer))``. ``state_dict`` refers to the tensors of the
    state, as torch's do; ``load_state_dict`` copies them.

    Args:
        model: its parameters with ``requires_grad`` are trained, tied ones once.
        method: gives the directions and the update. Or a first-order baseline, whose closure must carry a graph; its
            gradients are computed in the step and freed before it ends.
        lr: theta_b moves by -lr * projected gradient * u_b; None: the method's own default, or 1e-6. ``auto``: lr is
            step_fraction over the mean curvature along the directions, which outputs of the closure tell; where it returns a
            scalar, some steps evaluate it once more. The ``lr`` of ``param_groups`` then is step_fraction.
        seed: fixes every direction, together with the step and the block's name.
        weight_decay: theta_b shrinks by lr * weight_decay each step, save blocks of one dimension (biases, norms).
        groups: overrides by name, each ``{"match": pattern, "lr": …, "weight_decay": …}``; the first match holds. Under
            ``auto`` that ``lr`` is the group's step_fraction.
        perturb, sparse_embeddings: see :class:`l2l.params.PerturbedParameters`.
        update: for half-precision weights, ``master`` or ``stochastic``; ``auto``: see :func:`choose_update`.
        step_fraction: under ``auto``, the fraction of the step to the minimum of the parabola; None: that of
            ``curvature_lr``.
        curvature_lr: under ``auto``, when curvature is measured and how it is averaged; None: the defaults.
        on_bad_loss: what becomes of a step with a loss that is not finite, or explodes: ``raise``, ``skip``, ``clip`` or
            ``rollback:N``; see :mod:`l2l.bad_loss`. ``bad_losses.counts`` counts them.

    Raises:
        TypeError: ``model`` is no module, but its parameters, say.
        ValueError: a value out of range, nothing to train, a group that matches no block, step_fraction or curvature_lr
            given where lr is a number.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: base.Method[Any] | base.FirstOrder[Any],
        lr: LearningRate | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        groups: Sequence[Mapping[str, Any]] = (),
        perturb: Literal["auto", "in_place", "functional"] = "auto",
        update: Literal["auto", "master", "stochastic"] = "auto",
        sparse_embeddings: bool = False,
        step_fraction: float | None = None,
        curvature_lr: CurvatureLR | None = None,
        on_bad_loss: str = "raise",
    ) -> None:
        self.on_bad_loss, self.bad_losses = Policy.parse(on_bad_loss), BadLosses()
        self._copies: list[dict[str, Any]] = []
        lr, seed, weight_decay, step_fraction = map(plain, (lr, seed, weight_decay, step_fraction))
        lr = (method.default_lr or DEFAULT_LR) if lr is None else lr
        check_lr(lr=lr)
        if lr != "auto" and (step_fraction is not None or curvature_lr is not None):
            raise ValueError(
                f"lr={lr} is a number, so step_fraction and curvature_lr mean nothing: pass lr='auto', or leave them out"
            )
        chosen = (curvature_lr or CurvatureLR()) if lr == "auto" else None
        self.curvature_lr = chosen and (chosen if step_fraction is None else replace(chosen, step_fraction=step_fraction))
        self.curvature_lr_state = CurvatureLRState()
        _check_decay(weight_decay)
        Key(seed)  # refuses a value that is not a seed
        if lr == "auto" and isinstance(method, base.Method) and method.step_is_normalized:
            name = type(method).__name__
            raise ValueError(
                f"lr='auto' is a share of the way to the bottom of the parabola seen, and the step of {name} has a "
                "length of its own: give lr as a number"
            )
        if method.differentiates and stream_of(model) is not None:
            raise ValueError(
                f"{type(method).__name__} takes derivatives, and offloaded layers have no backward pass: use a method of "
                "forward passes alone, as mezo is, or leave offload off"
            )
        self._groups = tuple(dict(group) for group in groups)
        self._choices = {"perturb": perturb, "update": update, "sparse_embeddings": sparse_embeddings}
        split, self.method = _split(Blocks.of(model), groups), method
        super().__init__(
            [{"params": [(b.name, b.tensor) for b in inside], **options} for inside, options in split],
            {"lr": self.curvature_lr.nominal if self.curvature_lr else lr, "weight_decay": weight_decay},
        )
        self.seed = seed
        self.steps_done = 0
        self.theta = self._perturbed(split, model)
        if isinstance(method, base.FirstOrder):
            if lr == "auto":
                raise ValueError(
                    "lr='auto' reads the curvature along the directions of a zeroth-order method: give lr as a number"
                )
            if sparse_embeddings:
                raise ValueError("sparse_embeddings restricts directions, and a first-order method has none: leave it off")
            if self.theta.update == "stochastic":
                raise ValueError("a first-order method moves half-precision weights by a float32 copy: use update='master'")
        self.method_state = self._first_state(self.theta)
        self.report: StepReport | None = None
        self._attachment = Attachment(self.blocks)
        self._flat = 0  # steps in a row without a projected gradient
        self._told: set[str] = set()
        if copies := self.on_bad_loss.back:
            each = sum(block.tensor.nbytes for block in self.blocks) + method.state_bytes(self.blocks)
            if (free := available_bytes()) < (copies + 1) * each:
                raise ValueError(
                    f"on_bad_loss='rollback:{copies}' keeps {copies + 1} copies of {each:,} bytes in memory, where {free:,} "
                    "are free: go back fewer steps, train fewer weights (scheme lora, train_layers top:5), or use skip"
                )

    def _perturbed(self, split: Sequence[tuple[list[Block], Any]], model: torch.nn.Module) -> PerturbedParameters:
        ordered = Blocks((block for inside, _ in split for block in inside), model)
        perturb, update, sparse = self._choices.values()
        automatic = "master" if isinstance(self.method, base.FirstOrder) else choose_update(ordered)
        return PerturbedParameters(ordered, perturb, automatic if update == "auto" else update, sparse)

    def _first_state(self, theta: PerturbedParameters) -> Any:
        """The method's state before the first step. ValueError where it has tensors of blocks that are sharded."""
        state = self.method.init(theta.blocks)
        if any(map(is_shard, _tensors_in(_plain(state)))):
            theta.check_whole(f"the state of {type(self.method).__name__}, of the size of the weights,")
        return state

    @property
    def blocks(self) -> Blocks:
        """The blocks being trained."""
        return self.theta.blocks

    def rebind(self, model: torch.nn.Module) -> None:
        """Take a model as it is now: with other adapters, in another precision, on another device, frozen elsewhere, or anew.

        Seed, step and the groups' learning rates stay. So does the method's state where blocks have the names and shapes that
        they had; else it begins anew.

        Raises:
            TypeError, ValueError: as of a new optimizer; or a group has no block any more. Nothing has changed then.
        """
        self.theta.restore()
        split = _split(Blocks.of(model), self._groups)
        if len(split) != len(self.param_groups):
            raise ValueError(
                f"the model's blocks make {len(split)} groups, and the optimizer has {len(self.param_groups)}: make a new one"
            )
        theta = self._perturbed(split, model)
        state = self._first_state(theta)
        before, now = ([(block.name, block.tensor.shape) for block in blocks] for blocks in (self.blocks, theta.blocks))
        if before == now:
            state = _restored(state, _plain(self.method_state))
        self.theta, self.method_state, self._attachment, self._flat = theta, state, Attachment(theta.blocks), 0
        self._copies = []  # of other blocks
        for group, (inside, _) in zip(self.param_groups, split, strict=True):
            group |= {"params": [block.tensor for block in inside], "param_names": [block.name for block in inside]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: what is trained is what requires gradients.

        Raises:
            ValueError: always, then.
        """
        if hasattr(self, "theta"):
            raise ValueError(
                "the blocks of a zeroth-order optimizer are its model's: set requires_grad on the parameters and call "
                "optimizer.rebind(model), or make a new optimizer with groups=[{'match': ..., 'lr': ...}]"
            )
        super().add_param_group(param_group)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Closure | None = None,
        fresh: Callable[[int], Closure] | None = None,
        left_out: Callable[[], Sequence[int]] | None = None,
    ) -> float:
        """One step; gives the mean of its losses as a float.

        Args:
            closure: computes the loss of this step's batch, e.g. ``lambda: model(**batch).loss``; or losses per example [b],
                or ``(logits [m, K], targets [m])``, of which ``lr="auto"`` and ``rsgn`` make use. It is called twice per
                direction, and once more where a scalar must tell the curvature; it must not depend on hidden randomness (call
                ``model.eval()``). It is required.
            fresh: further batches for methods that search; see :func:`zo_step`.
            left_out: directions that are no part of the step; see :func:`zo_step`. A first-order method has none.

        Warns:
            UserWarning: once each, where evaluations are unfit (:data:`UNFIT`), or several steps in a row have seen no
                difference of losses.

        Raises:
            TypeError: there is no closure, or its value means no loss.
            ValueError: a scheduled learning rate is negative or not finite.
            RuntimeError: the model is not as it was when the optimizer was made; see :meth:`rebind`.
            FloatingPointError: a loss is not finite; theta is back where the step began.
        """
        if not callable(closure):
            raise TypeError(
                f"step() was given {'no closure' if closure is None else type(closure).__name__}: a zeroth-order step computes "
                "the loss itself, at perturbed weights; call optimizer.step(lambda: model(**batch).loss). In a transformers or "
                "TRL trainer, use l2l.integrations.ZOTrainer, or ZOTrainerMixin before the trainer's class"
            )
        if self.blocks.sharded is not None:
            reshard(self.blocks.model)  # a pass outside of steps may have left whole weights in the shards' place
        if (change := self._attachment.change()) is not None:
            raise RuntimeError(
                f"the model is not as it was when the optimizer was made: {change}. Call optimizer.rebind(model), or make a "
                "new optimizer"
            )
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        lr = [float(group["lr"]) for group, _ in pairs]
        for group in self.param_groups:
            check_scheduled_lr("lr", float(group["lr"]))
        decay = [float(group["weight_decay"]) if p.ndim > 1 else 0.0 for group, p in pairs]
        key = Key(self.seed, self.steps_done)
        check, copies = StepCheck(self.on_bad_loss, self.bad_losses), self._copies
        graded = any(block.tensor.grad is not None for block in self.blocks)
        try:
            with self.theta.until_counted():
                if self.on_bad_loss.back:
                    self._copies = [*copies[-self.on_bad_loss.back :], self._copy()]
                self._take(closure, key, lr, decay, fresh, check, left_out)
                self.steps_done += 1
                copies = self._copies
        finally:
            self._copies = copies  # a step that was not counted leaves none
        assert self.report is not None, "a step leaves a report"
        self._advise(self.report, not graded and any(block.tensor.grad is not None for block in self.blocks))
        return self.report.loss

    def _take(
        self,
        closure: Closure,
        key: Key,
        lr: Sequence[float],
        decay: Sequence[float],
        fresh: Callable[[int], Closure] | None,
        check: StepCheck,
        left_out: Callable[[], Sequence[int]] | None,
    ) -> None:
        """Take the step, or drop it; it then is final."""
        try:
            if isinstance(self.method, base.FirstOrder):
                stepped = first_order_step(closure, self.theta, self.method, self.method_state, key, lr, decay, check.judge)
            else:
                own = self.theta, self.method, self.method_state, key, lr, decay, fresh
                stepped = zo_step(closure, *own, self.curvature_lr, self.curvature_lr_state, check, left_out)
        except FloatingPointError as error:
            if self.on_bad_loss.kind == "raise":
                raise
            self._drop(error, key)
        except RuntimeError as error:
            if "does not require grad" in str(error):  # torch's, of a backward pass where gradients are off
                raise RuntimeError(UNFIT["backward"]) from error
            raise
        else:
            self.method_state, self.report = stepped
            self.curvature_lr_state, self.bad_losses = self.report.curvature_lr_state, check.seen

    def _drop(self, error: FloatingPointError, key: Key) -> None:
        """Leave out the step that failed, and go back where the policy says so."""
        counted = dropped(self.bad_losses, error, bool(self.on_bad_loss.back))
        back = self._copies[0] if self.on_bad_loss.back else None
        state = None if back is None else _restored(self.method_state, back["method"])
        self.theta.final()
        if back is not None:
            self.theta.assign(back["weights"])
            self.theta.load_extra_state(back["masters"])
            self.method_state, self.curvature_lr_state = state, CurvatureLRState(**back["curvature"])
            self._copies = []
        self.bad_losses = counted
        loss, passes = (error.loss, error.passes) if isinstance(error, BadLoss) else (math.nan, 0)
        passes = FIRST_ORDER_PASSES if isinstance(self.method, base.FirstOrder) else passes
        rates, seen = (0.0,) * len(self.blocks), self.curvature_lr_state
        self.report = StepReport(key, (), passes, rates, None, seen, loss, math.nan, dropped=str(error))
        if isinstance(error, BadLoss):  # a replay takes the step again, and drops it again
            self.report = replace(self.report, evaluations=error.evaluations, readings=error.readings)

    def _copy(self) -> dict[str, Any]:
        """Weights, and whatever a step changes beside them, in memory of their own; weights in the host's."""
        masters = self.theta.extra_state()  # restores theta
        tensors = {block.name: block.tensor.detach() for block in self.blocks}
        copied = ({name: x.to("cpu", copy=True) for name, x in some.items()} for some in (tensors, masters))
        state, seen = deepcopy(_plain(self.method_state)), asdict(self.curvature_lr_state)
        return dict(zip(("weights", "masters"), copied, strict=True)) | {"method": state, "curvature": seen}

    def _advise(self, report: StepReport, backward: bool) -> None:
        """Warn, once each, of what the step has shown."""
        names = {*report.unfit, *(["accumulate"] if _accumulating() else [])}
        if backward or UNFIT["backward"] in self._told:  # the graph that it has gone through is the same fault
            names = names - {"graph"} | {"backward"}
        found = [UNFIT[name] for name in sorted(names)]
        slopes = [e.projected_gradient for e in report.estimates] or [report.projected_gradient]
        self._flat = 0 if any(slopes) else self._flat + 1
        if self._flat == FLAT_STEPS:
            self._told.discard(FLAT)
            found.append(FLAT)
        for text in found:
            if text not in self._told:
                self._told.add(text)
                warnings.warn(text, stacklevel=4)  # the caller of step, which torch wraps

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the weights, exactly. Restores the unperturbed weights."""

        def completed(_: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            kept = {"seed": self.seed, "step": self.steps_done, "method": _plain(self.method_state)}
            kept["masters"] = self.theta.extra_state()
            kept["control"] = curvature_lr_state(self.curvature_lr, self.curvature_lr_state)
            kept["bad_losses"] = {"seen": asdict(self.bad_losses), "copies": self._copies}
            return {**found, STATE: kept}

        before_hooks = self.register_state_dict_post_hook(completed, prepend=True)
        try:
            return super().state_dict()
        finally:
            before_hooks.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: with its learning rates, ``auto`` or not. Tensors are copied.

        Raises:
            ValueError: it belongs to another kind of optimizer or method. Nothing has changed then.
        """
        taken: list[Callable[[], None]] = []
        after_hooks = self.register_load_state_dict_pre_hook(lambda _, given: taken.append(self._loading(given)))
        before_hooks = self.register_load_state_dict_post_hook(lambda _: taken[0](), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            after_hooks.remove()
            before_hooks.remove()

    def _loading(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        """Takes over what a checked state has beside the groups."""
        kept = state_dict.get(STATE)
        if kept is None:
            raise ValueError("this state_dict has no zeroth-order state: it belongs to another optimizer")
        restored = _restored(self.method_state, kept["method"])
        auto = kept.get("control")  # of lr="auto", as curvature_lr_state gives it
        control, seen = auto and CurvatureLR(**auto["settings"]), CurvatureLRState(**(auto["seen"] if auto else {}))
        masters, bad = kept.get("masters", {}), kept.get("bad_losses", {"seen": {}, "copies": []})
        self.theta.check_extra_state(masters)

        def take() -> None:
            self.theta.load_extra_state(masters)
            self.seed, self.steps_done, self.method_state = kept["seed"], kept["step"], restored
            self.curvature_lr, self.curvature_lr_state = control, seen
            self.bad_losses, self._copies = BadLosses(**bad["seen"]), deepcopy(bad["copies"])

        return take

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name in _COPIED}
        return {**super().__getstate__(), **kept, "report": None}


_COPIED = (
    *("method", "method_state", "theta", "seed", "steps_done", "curvature_lr", "curvature_lr_state"),
    *("on_bad_loss", "bad_losses", "_copies", "_groups", "_choices", "_attachment", "_flat", "_told"),
)
"""Attributes that a copy has beside those of torch's optimizers; a report it makes by itself."""
FLAT = (
    f"no loss has changed between the two sides of any direction for {FLAT_STEPS} steps in a row, to the last bit, so nothing "
    "is learned: the closure must compute the loss anew, of the model that the optimizer was made for; if it does, the "
    "difference is lost in rounding (compute the loss in float32, or raise epsilon), or a step was so large that the loss is "
    "constant (start again with a lower lr)"
)


def _accumulating() -> bool:
    """Whether accelerate steps once in several batches: its gradient state, where it is in use, is one for the process."""
    accelerate = sys.modules.get("accelerate")
    shared = getattr(getattr(accelerate, "state", None), "GradientState", None)
    return shared is not None and bool(shared._shared_state) and shared().num_steps > 1


def choose_update(blocks: Blocks) -> Literal["master", "stochastic"]:
    """How half-precision weights take updates by default.

    ``master``, a float32 copy, where it takes at most half of the memory that is free on the device; else
    ``stochastic`` rounding, if the weights are bfloat16.
    """
    half = [block for block in blocks if block.tensor.dtype in (torch.bfloat16, torch.float16)]
    if not half or any(block.tensor.dtype == torch.float16 for block in half):
        return "master"
    needed = sum(4 * block.numel for block in half)
    return "master" if 2 * needed <= available_bytes(half[0].tensor.device) else "stochastic"


def _check_decay(value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"weight_decay={value} must be finite and not negative")


def _split(blocks: Blocks, groups: Sequence[Mapping[str, Any]]) -> list[tuple[list[Block], dict[str, Any]]]:
    rest, split = list(blocks), []
    for group in groups:
        if "match" not in group or not set(group) <= {"match", "lr", "weight_decay"}:
            raise ValueError(f"group {dict(group)} must have 'match' and may have 'lr' and 'weight_decay', nothing else")
        check_scheduled_lr("lr", float(group.get("lr", 0.0)))
        _check_decay(group.get("weight_decay", 0.0))
        inside = [block for block in rest if re.search(group["match"], block.name)]
        if not inside:
            raise ValueError(f"group match={group['match']!r} takes no block; names look like {blocks.names[0]!r}")
        rest = [block for block in rest if block not in inside]
        split.append((inside, {name: value for name, value in group.items() if name != "match"}))
    return [*split, (rest, {})] if rest else split


def _plain(state: Any) -> Any:
    """A method's state as dictionaries; states of what is wrapped lie inside."""
    if not is_dataclass(state):
        return state
    return {field.name: _plain(getattr(state, field.name)) for field in fields(state)}


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of plain values, one by one."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(inner)


def _restored(fresh: Any, kept: Any) -> Any:
    """The saved state ``kept`` as one of the kind of ``fresh``, whose devices and precisions its own copies of tensors have."""
    names = {field.name for field in fields(fresh)} if is_dataclass(fresh) else None
    alike = names == set(kept) if names and isinstance(kept, Mapping) else not names
    if not alike or (isinstance(kept, Mapping) and not names and not isinstance(fresh, Mapping)):
        raise ValueError(f"the saved method state does not fit {type(fresh).__name__}: was it another method?")
    if names is None:
        return _copied(kept, fresh)
    values = {name: _restored(getattr(fresh, name), kept[name]) for name in names}
    return type(fresh)(**values)  # pyright: ignore[reportCallIssue]


def _copied(value: Any, like: Any = None) -> Any:
    """The value with copies of its tensors, each on the device and in the precision of the one at its place in ``like``."""
    if isinstance(value, torch.Tensor):
        like = like if isinstance(like, torch.Tensor) else value
        both = like.is_floating_point() and value.is_floating_point()
        return value.detach().to(like.device, like.dtype if both else value.dtype, copy=True)
    if isinstance(value, tuple | list):
        likes = like if isinstance(like, tuple | list) and len(like) == len(value) else [None] * len(value)
        return type(value)(map(_copied, value, likes))
    if isinstance(value, Mapping):
        likes = like if isinstance(like, Mapping) else {}
        return {name: _copied(one, likes.get(name)) for name, one in value.items()}
    return value


def __getattr__(name: str) -> Any:  # l2l.optim.MeZO and the like, which are made of what is above
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from l2l.optimizers import optimizer

    return optimizer(name)
