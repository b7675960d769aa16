"""Step control: how far to go, read from the curvature that a third loss shows; and schedules over a run.

With L+ and L- at theta +- epsilon u and L0 at theta, all on one batch, (L+ + L- - 2 L0) / epsilon^2 is u^T H u up to
O(epsilon^2), and exactly on a quadratic. Along u the step of a parabola is 1 / (u^T H u) times the projected gradient;
beta / mean(|u^T H u|) goes a share beta of it. Losses in another unit, a longer u or another model change the curvature
as they change the step, so beta is a pure number. Pure functions; the state is three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from l2l.methods.base import check_counts, check_positive

LearningRate: TypeAlias = float | Literal["auto"]
"""A number, or ``auto``: beta over the curvature."""
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class CurvatureLR:
    """When curvature is measured, and what is made of it.

    Raises:
        ValueError: a value out of range.
    """

    step_fraction: float = 0.1
    """The share of the step to the bottom of the parabola along u. Torch schedulers act on it: it is the ``lr`` of the
    parameter groups."""
    every: int = 5
    """Steps from one third loss to the next: a step takes 1 / every more forward passes on average."""
    warm_up: int = 5
    """First steps, at each of which it is taken, so that the average soon rests on several."""
    needed: int = 3
    """Measurements before theta first moves: until then the rate is 0. One alone is close to 0 now and then, where valley and
    ridge cancel along u, and a step by it would end the run. Theta first moves at step 2."""
    decay: float = 0.9
    """What the average keeps of itself at each measurement. Once many are seen, the rate grows by at most 1 / decay from
    one measurement to the next, whatever is measured."""
    resolution: float = 2.0**-21
    """The relative error a loss may have: a few roundings in float32. A curvature that it could feign,
    resolution * |loss| / epsilon^2, is the least that counts, so that flat losses cannot make the rate explode."""

    def __post_init__(self) -> None:
        check_positive(beta=self.step_fraction)
        check_counts(every=self.every, needed=self.needed)
        if not isinstance(self.warm_up, int) or isinstance(self.warm_up, bool) or self.warm_up < 0:
            raise ValueError(f"warm_up={self.warm_up} must be a whole number, at least 0")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")
        if not 0 <= self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be at least 0 and below 1")

    def due(self, step: int) -> bool:
        """Whether step ``step``, counted from 0, takes a third loss; the first one always does."""
        return step < self.warm_up or step % self.every == 0

    def rates(self, betas: Sequence[float], state: CurvatureLRState) -> tuple[float, ...]:
        """:func:`rate` of each block; 0 as long as more measurements are needed."""
        return tuple(learning_rate(beta, state) if state.count >= self.needed else 0.0 for beta in betas)


@dataclass(frozen=True)
class CurvatureLRState:
    """The running mean of curvature, as a sum and the weights in it: nothing seen weighs nothing."""

    total: float = 0.0
    weight: float = 0.0
    count: int = 0
    """Measurements in it."""

    @property
    def average(self) -> float:
        """Mean curvature of what was seen; 0 where nothing was."""
        return self.total / self.weight if self.weight else 0.0


def curvature(
    loss_plus: float, loss_minus: float, loss_center: float, epsilon: float, resolution: float = CurvatureLR.resolution
) -> float:
    """|u^T H u| from losses at theta + epsilon u, theta - epsilon u and theta; at least what rounding could feign.

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


def update_average(state: CurvatureLRState, measured: float, decay: float) -> CurvatureLRState:
    """The state with one more measurement in its mean."""
    total, weight = decay * state.total + (1 - decay) * measured, decay * state.weight + (1 - decay)
    return CurvatureLRState(total, weight, state.count + 1)


def learning_rate(step_fraction: float, state: CurvatureLRState) -> float:
    """The learning rate: beta over the mean curvature. 0 where that is 0: who has seen nothing does not move."""
    return step_fraction / state.average if state.average else 0.0


def choose_curvature_lr(lr: LearningRate, step_fraction: float | None, curvature_lr: CurvatureLR | None) -> CurvatureLR | None:
    """Step control from the arguments of an optimizer; None where lr is a number.

    Raises:
        ValueError: lr is out of range, or a number although beta or control is given.
    """
    check_lr(lr=lr)
    if lr == "auto":
        found = curvature_lr or CurvatureLR()
        return found if step_fraction is None else replace(found, beta=step_fraction)
    if step_fraction is not None or curvature_lr is not None:
        raise ValueError(f"lr={lr} is a number, so beta and control mean nothing: pass lr='auto', or leave them out")
    return None


def curvature_lr_state(control: CurvatureLR | None, state: CurvatureLRState) -> dict[str, dict[str, Any]] | None:
    """Step control as plain values; None where there is none."""
    return None if control is None else {"settings": asdict(control), "seen": asdict(state)}


def restore_curvature_lr(kept: Mapping[str, Mapping[str, Any]] | None) -> tuple[CurvatureLR | None, CurvatureLRState]:
    """Step control from what :func:`kept_control` gave."""
    if kept is None:
        return None, CurvatureLRState()
    return CurvatureLR(**kept["settings"]), CurvatureLRState(**kept["seen"])


def schedule_factor(schedule: Schedule, progress: float, end: float = 0.0) -> float:
    """What the learning rate is multiplied by at ``progress`` (0 to 1) through a run.

    ``constant``: 1. ``linear`` and ``cosine`` fall from 1 to ``end``, along a line or half a cosine.
    """
    if schedule == "constant":
        return 1.0
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return end + (1 - end) * left


def check_lr(**values: LearningRate) -> None:
    """Raise ValueError, naming the first value that is neither ``"auto"`` nor a positive finite number."""
    for name, value in values.items():
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"{name}={value!r} must be a number or 'auto'")
        if not isinstance(value, str):
            check_positive(**{name: value})


def check_schedule(schedule: str, end: float) -> None:
    """Raise ValueError where the schedule is unknown, or does not end between 0 and 1."""
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}; use one of {', '.join(get_args(Schedule))}")
    if not 0 <= end <= 1:
        raise ValueError(f"schedule_end={end} must be between 0 and 1")
