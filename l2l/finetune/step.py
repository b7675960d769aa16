"""The one loop body of the project: look, see, update, be home again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from l2l.estimators.base import Closure, Estimate
from l2l.estimators.two_point import third_point, two_point
from l2l.finetune.control import ControlState, StepControl, averaged, curvature, rates
from l2l.methods.base import Method, StepContext
from l2l.noise import Key
from l2l.perturb import Theta


@dataclass(frozen=True)
class StepReport:
    """What one step saw."""

    key: Key
    estimates: tuple[Estimate, ...]
    passes: int
    """Evaluations of a closure, those of searches and third losses included; a backward pass counts as two more."""
    lr: tuple[float, ...]
    """Learning rate of each block, as it was used."""
    curvature: float | None
    """|u^T H u| along the first direction, where a third loss was taken."""
    control: ControlState
    """What step control remembers after the step."""

    @property
    def loss(self) -> float:
        """Mean of the losses seen along the directions."""
        return sum(e.loss_plus + e.loss_minus for e in self.estimates) / (2 * len(self.estimates))

    @property
    def projected_gradient(self) -> float:
        """Mean projected gradient."""
        return sum(e.projected_gradient for e in self.estimates) / len(self.estimates)


class _Counter:
    """Counts what the closures of a step cost."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, closure: Closure) -> Closure:
        def counted() -> Tensor | float:
            value = closure()
            self.passes += 3 if isinstance(value, Tensor) and value.requires_grad else 1
            return value

        return counted


def zo_step(
    closure: Closure,
    theta: Theta,
    method: Method[Any],
    state: Any,
    key: Key,
    lr: Sequence[float],
    weight_decay: Sequence[float] | None = None,
    fresh: Callable[[int], Closure] | None = None,
    control: StepControl | None = None,
    control_state: ControlState = ControlState(),
) -> tuple[Any, StepReport]:
    """One zeroth-order step of ``method``: the next state, and what was seen. Theta is home again afterwards.

    Args:
        closure: loss on this step's batch at the parameters as they stand.
        lr: learning rate of each block; under step control, beta of each block.
        weight_decay: decay of each block: theta_b -= lr_b * decay_b * theta_b, after the update.
        fresh: ``fresh(i)`` is the loss on a further batch, for methods that search; None: always this step's.
        control: set the learning rates to beta over the mean curvature, this step's included where it is measured.
        control_state: what the report of the step before holds.

    Raises:
        FloatingPointError: a loss is not finite. Theta is back where the step began, as after any other error.
    """
    counter = _Counter()
    counted = counter(closure)

    def further(number: int) -> Closure:
        own = counted if fresh is None else counter(fresh(number))
        return lambda: theta.evaluate(own)

    with theta.step():
        # Directions first: they read theta at home.
        directions = [method.direction(theta.blocks, state, key.with_draw(draw)) for draw in range(method.draws)]
        due = control is not None and control.due(key.step)
        middle = third_point(counted, theta, directions[0]) if due else None
        bend = None
        estimates = tuple(two_point(counted, theta, direction, method.epsilon) for direction in directions)
        if control is not None:
            bend, control_state = _measured(control, control_state, estimates[0], middle, method.epsilon)
            lr = rates(lr, control_state)
        following = method.update_(
            theta, state, estimates, StepContext(key, tuple(lr), lambda: theta.evaluate(counted), further, bend)
        )
        if weight_decay is not None and any(weight_decay):
            theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
    return following, StepReport(key, estimates, counter.passes, tuple(lr), bend, control_state)


def _measured(
    control: StepControl, state: ControlState, seen: Estimate, middle: float | None, epsilon: float
) -> tuple[float | None, ControlState]:
    """Curvature along the direction seen, and the state with it; without a third loss there is nothing to add."""
    if middle is None:
        return None, state
    found = curvature(seen.loss_plus, seen.loss_minus, middle, epsilon, control.resolution)
    return found, averaged(state, found, control.decay)
