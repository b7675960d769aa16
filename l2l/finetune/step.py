"""The one loop body of the project: look, see, update, be home again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from l2l.estimators.base import Closure, Estimate
from l2l.estimators.two_point import two_point
from l2l.methods.base import Method, StepContext
from l2l.noise import Key
from l2l.perturb import Theta


@dataclass(frozen=True)
class StepReport:
    """What one step saw."""

    key: Key
    estimates: tuple[Estimate, ...]
    passes: int
    """Evaluations of a closure, those of searches included; a backward pass counts as two more."""

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
) -> tuple[Any, StepReport]:
    """One zeroth-order step of ``method``: the next state, and what was seen. Theta is home again afterwards.

    Args:
        closure: loss on this step's batch at the parameters as they stand.
        lr: learning rate of each block.
        weight_decay: decay of each block: theta_b -= lr_b * decay_b * theta_b, after the update.
        fresh: ``fresh(i)`` is the loss on a further batch, for methods that search; None: always this step's.

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
        estimates = tuple(two_point(counted, theta, direction, method.epsilon) for direction in directions)
        following = method.update_(
            theta, state, estimates, StepContext(key, tuple(lr), lambda: theta.evaluate(counted), further)
        )
        if weight_decay is not None and any(weight_decay):
            theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
    return following, StepReport(key, estimates, counter.passes)
