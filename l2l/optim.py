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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch.autograd import forward_ad
from torch.optim import Optimizer

from l2l.estimators import (
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
from l2l.noise import Key
from l2l.params import Block, Blocks, PerturbedParameters
from l2l.params.engine import defer_interrupt
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
    """Raise ValueError, naming the first value that is neither ``"auto"`` nor finite and not negative.

    0 is allowed as in torch: warm-up schedules begin there.
    """
    for name, value in values.items():
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"{name}={value!r} must be a number or 'auto'")
        if not isinstance(value, str) and not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be finite and not negative")


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
    evaluations: tuple[float, ...] = ()
    """The losses of the step in the order in which they were evaluated. With them and the next, a replay repeats the step."""
    readings: tuple[tuple[float, ...], ...] = ()
    """What was read from evaluations beside their losses, in turn."""

    @property
    def loss(self) -> float:
        """Mean of the losses along the directions; of a first-order step, the loss at theta."""
        if self.loss_center is not None:
            return self.loss_center
        return sum(e.loss for e in self.estimates) / len(self.estimates)

    @property
    def projected_gradient(self) -> float:
        """Mean projected gradient; of a first-order step the norm, which is the gradient projected on itself."""
        if self.gradient_norm is not None:
            return self.gradient_norm
        return sum(e.projected_gradient for e in self.estimates) / len(self.estimates)


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
    """Counts the passes of the closures of a step, and keeps what they give, in turn: their losses, and what is read beside."""

    def __init__(self, closure: Closure) -> None:
        self._logged = closure if isinstance(closure, Logged) else None
        self.passes = 0
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
        else:
            self._reading = True
            found = list(map(float, compute()))
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
) -> tuple[Any, StepReport]:
    """One step of ``method``: estimate, update, restore. Gives the method's next state and a report.

    Args:
        closure: loss or outputs on this step's batch at the present parameters; see :data:`l2l.estimators.ClosureValue`.
        lr: learning rate of each block; with ``curvature_lr``, the step fraction of each block.
        weight_decay: decay of each block: theta_b -= lr_b * decay_b * theta_b, after the update.
        fresh: ``fresh(i)`` is the loss on a further batch, for methods that search; None: always this step's.
        curvature_lr: set the learning rates to lr over the mean curvature, this step's included where it is measured.
        curvature_lr_state: from the report of the step before.

    Raises:
        FloatingPointError: a loss is not finite. The parameters are back where the step began, as after any other error.
    """
    tape = _Tape(closure)
    counted = tape(closure)
    record = _Record(theta)
    if curvature_lr is not None:
        counted = record(counted)

    def further(number: int) -> Closure:
        return _evaluated(theta, counted if fresh is None else tape(fresh(number)))

    with theta.step():
        bend = None
        due = curvature_lr is not None and not curvature_lr_state.from_outputs and curvature_lr.due(key.step)
        evaluator = base.LossEvaluator(theta, key, counted, lambda direction: direction, tape.reading)
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
        context = base.StepContext(key, tuple(lr), _evaluated(theta, counted), further, bend, tape.reading)
        following = method.update_(theta, state, estimates, context)
        if weight_decay is not None and any(weight_decay):
            theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
    report = StepReport(key, estimates, tape.passes, tuple(lr), bend, curvature_lr_state)
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
) -> tuple[Any, StepReport]:
    """One first-order step: the next state and a report. Arguments are those of :func:`zo_step`.

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
            raise FloatingPointError(f"the norm of the gradient is {norm}: lower lr, or look for overflowing inputs")
        with defer_interrupt():  # blocks and state change together
            if weight_decay is not None and any(weight_decay):
                theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
            following = method.update_(theta, state, gradients, lr)
    report = StepReport(key, (), FIRST_ORDER_PASSES, tuple(lr), None, CurvatureLRState(), loss, norm)
    return following, replace(report, evaluations=(loss,))


DEFAULT_LR = 1e-6
"""Of MeZO and its kind on models of a billion parameters."""
STATE = "zeroth_order"
"""Entry of ``state_dict`` that holds seed, step, step control and the method's state."""


@final
class ZOOptimizer(Optimizer):
    """A zeroth-order method as a torch optimizer: no gradients are computed or stored.

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

    Raises:
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
    ) -> None:
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
        found = Blocks.of(model)
        split = _split(found, groups)
        super().__init__(
            [{"params": [(b.name, b.tensor) for b in inside], **options} for inside, options in split],
            {"lr": self.curvature_lr.nominal if self.curvature_lr else lr, "weight_decay": weight_decay},
        )
        self.method = method
        self.seed = seed
        self.steps_done = 0
        ordered = Blocks(block for inside, _ in split for block in inside)
        automatic = "master" if isinstance(method, base.FirstOrder) else choose_update(ordered)
        self.theta = PerturbedParameters(ordered, perturb, automatic if update == "auto" else update, sparse_embeddings)
        if isinstance(method, base.FirstOrder):
            if lr == "auto":
                raise ValueError(
                    "lr='auto' reads the curvature along the directions of a zeroth-order method: give lr as a number"
                )
            if sparse_embeddings:
                raise ValueError("sparse_embeddings restricts directions, and a first-order method has none: leave it off")
            if self.theta.update == "stochastic":
                raise ValueError("a first-order method moves half-precision weights by a float32 copy: use update='master'")
        self.method_state: Any = method.init(self.theta.blocks)
        self.report: StepReport | None = None

    @property
    def blocks(self) -> Blocks:
        """The blocks being trained."""
        return self.theta.blocks

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closure, fresh: Callable[[int], Closure] | None = None
    ) -> float:
        """One step; gives the mean of its losses as a float.

        Args:
            closure: computes the loss of this step's batch, e.g. ``lambda: model(**batch).loss``; or losses per example [b],
                or ``(logits [m, K], targets [m])``, of which ``lr="auto"`` and ``rsgn`` make use. It is called twice per
                direction, and once more where a scalar must tell the curvature; it must not depend on hidden randomness (call
                ``model.eval()``).
            fresh: further batches for methods that search; see :func:`zo_step`.

        Raises:
            FloatingPointError: a loss is not finite; theta is back where the step began.
        """
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        if len(pairs) != len(self.blocks):
            raise ValueError("a parameter group was added after the optimizer was made: make a new optimizer instead")
        lr = [float(group["lr"]) for group, _ in pairs]
        decay = [float(group["weight_decay"]) if p.ndim > 1 else 0.0 for group, p in pairs]
        key = Key(self.seed, self.steps_done)
        if isinstance(self.method, base.FirstOrder):
            stepped = first_order_step(closure, self.theta, self.method, self.method_state, key, lr, decay)
        else:
            control, seen = self.curvature_lr, self.curvature_lr_state
            stepped = zo_step(closure, self.theta, self.method, self.method_state, key, lr, decay, fresh, control, seen)
        self.method_state, self.report = stepped
        self.curvature_lr_state = self.report.curvature_lr_state
        self.steps_done += 1
        self.theta.raise_deferred_interrupt()
        return self.report.loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the weights, exactly. Restores the unperturbed weights."""
        kept = {"seed": self.seed, "step": self.steps_done, "method": _plain(self.method_state)}
        kept["masters"] = self.theta.extra_state()
        kept["control"] = curvature_lr_state(self.curvature_lr, self.curvature_lr_state)
        return {**super().state_dict(), STATE: kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: with its learning rates, ``auto`` or not.

        Raises:
            ValueError: it belongs to another kind of optimizer or method.
        """
        kept = state_dict.get(STATE)
        if kept is None:
            raise ValueError("this state_dict has no zeroth-order state: it belongs to another optimizer")
        restored = _restored(self.method_state, kept["method"])
        auto = kept.get("control")  # of lr="auto", as curvature_lr_state gives it
        control, seen = auto and CurvatureLR(**auto["settings"]), CurvatureLRState(**(auto["seen"] if auto else {}))
        self.theta.load_extra_state(kept.get("masters", {}))
        super().load_state_dict({name: value for name, value in state_dict.items() if name != STATE})
        self.seed, self.steps_done, self.method_state = kept["seed"], kept["step"], restored
        self.curvature_lr, self.curvature_lr_state = control, seen


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
        check_lr(lr=float(group.get("lr", 0.0)))
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


def _restored(fresh: Any, kept: Any) -> Any:
    names = {field.name for field in fields(fresh)} if is_dataclass(fresh) else None
    alike = names == set(kept) if names and isinstance(kept, Mapping) else not names
    if not alike or (isinstance(kept, Mapping) and not names and not isinstance(fresh, Mapping)):
        raise ValueError(f"the saved method state does not fit {type(fresh).__name__}: was it another method?")
    if names is None:
        return kept
    values = {name: _restored(getattr(fresh, name), kept[name]) for name in names}
    return type(fresh)(**values)  # pyright: ignore[reportCallIssue]


def __getattr__(name: str) -> Any:  # l2l.optim.MeZO and the like, which are made of what is above
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from l2l.optimizers import optimizer

    return optimizer(name)
