"""The one loop body of the project: look, see, update, be home again. A first-order step beside it, as a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from l2l.estimators.backward import summed_gradients
from l2l.estimators.base import Closure, Estimate
from l2l.estimators.micro import MicroBatched, pieces_of
from l2l.estimators.one_sided import center_loss, loss_along
from l2l.estimators.two_point import third_point
from l2l.finetune.control import CurvatureLRState, CurvatureLR, update_average, curvature
from l2l.methods.base import FirstOrder, CustomEstimator, Method, LossEvaluator, StepContext, directions_of, run_estimator, accumulation_dtype
from l2l.noise import Key
from l2l.perturb import PerturbedParameters
from l2l.perturb.safety import defer_interrupt


@dataclass(frozen=True)
class StepReport:
    """What one step saw."""

    key: Key
    estimates: tuple[Estimate, ...]
    passes: int
    """Evaluations of a closure, those of searches and third losses included; a backward pass counts as two more,
    the tangents of a forward-mode one as one more."""
    lr: tuple[float, ...]
    """Learning rate of each block, as it was used."""
    curvature: float | None
    """|u^T H u| along the first direction, where a third loss was taken."""
    curvature_lr_state: CurvatureLRState
    """What step control remembers after the step."""
    loss_center: float | None = None
    """Loss at theta, where a first-order step read it; it looks along no direction, so there are no estimates."""
    gradient_norm: float | None = None
    """Of a first-order step."""

    @property
    def loss(self) -> float:
        """Mean of the losses seen along the directions; of a first-order step, the loss at theta."""
        if self.loss_center is not None:
            return self.loss_center
        return sum(e.loss for e in self.estimates) / len(self.estimates)

    @property
    def projected_gradient(self) -> float:
        """Mean projected gradient; of a first-order step the norm, which is the gradient projected on itself."""
        if self.gradient_norm is not None:
            return self.gradient_norm
        return sum(e.projected_gradient for e in self.estimates) / len(self.estimates)


class _Counter:
    """Counts what the closures of a step cost."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, closure: Closure) -> Closure:
        if isinstance(closure, MicroBatched):  # all pieces are one pass
            *others, last = closure.pieces
            return MicroBatched((*others, self(last)))

        def counted() -> Tensor | float:
            value = closure()
            self.passes += _cost(value)
            return value

        return counted


def _evaluated(theta: PerturbedParameters, closure: Closure) -> Closure:
    """The closure where theta stands, in pieces if it is."""
    if isinstance(closure, MicroBatched):
        pieces = tuple(partial(theta.evaluate, piece) for piece in closure.pieces)
        return MicroBatched(pieces, lambda: theta.evaluate(closure))
    return lambda: theta.evaluate(closure)


def _cost(value: Tensor | float) -> int:
    """Passes of an evaluation: a graph means that two more follow backwards, a tangent that it cost one more."""
    if not isinstance(value, Tensor):
        return 1
    if value.requires_grad:
        return 3
    return 1 if forward_ad.unpack_dual(value).tangent is None else 2


def zo_step(
    closure: Closure,
    theta: PerturbedParameters,
    method: Method[Any],
    state: Any,
    key: Key,
    lr: Sequence[float],
    weight_decay: Sequence[float] | None = None,
    fresh: Callable[[int], Closure] | None = None,
    curvature_lr: CurvatureLR | None = None,
    curvature_lr_state: CurvatureLRState = CurvatureLRState(),
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
        return _evaluated(theta, counted if fresh is None else counter(fresh(number)))

    with theta.step():
        due, bend = curvature_lr is not None and curvature_lr.due(key.step), None
        estimates, state = _look(LossEvaluator(theta, key, counted, lambda direction: direction), method, state, due)
        if curvature_lr is not None:
            bend, curvature_lr_state = _measured(curvature_lr, curvature_lr_state, estimates[0], due, method.epsilon)
            lr = curvature_lr.rates(lr, curvature_lr_state)
        following = method.update_(
            theta, state, estimates, StepContext(key, tuple(lr), _evaluated(theta, counted), further, bend)
        )
        if weight_decay is not None and any(weight_decay):
            theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
    return following, StepReport(key, estimates, counter.passes, tuple(lr), bend, curvature_lr_state)


FIRST_ORDER_PASSES = 3
"""A forward pass over the batch, and a backward pass, which counts as two more."""


def first_order_step(
    closure: Closure,
    theta: PerturbedParameters,
    method: FirstOrder[Any],
    state: Any,
    key: Key,
    lr: Sequence[float],
    weight_decay: Sequence[float] | None = None,
) -> tuple[Any, StepReport]:
    """One first-order step: the next state, and what was seen. Arguments are those of :func:`zo_step`.

    Raises:
        TypeError: the closure's value carries no graph.
        FloatingPointError: loss or gradient is not finite. Nothing has moved then, nor after any other error.
    """
    with theta.step():
        theta.restore()
        pieces = (partial(theta.evaluate, piece) for piece in pieces_of(closure))
        loss, gradients = summed_gradients(pieces, theta.blocks)
        norm = math.sqrt(sum(_norm(gradient) ** 2 for gradient in gradients.values()))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}: lower lr, or look for overflowing inputs")
        with defer_interrupt():  # blocks and state change together
            if weight_decay is not None and any(weight_decay):
                theta.shrink([1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)])
            following = method.update_(theta, state, gradients, lr)
    return following, StepReport(key, (), FIRST_ORDER_PASSES, tuple(lr), None, CurvatureLRState(), loss, norm)


def _norm(gradient: Tensor) -> float:
    return torch.linalg.vector_norm(gradient, dtype=accumulation_dtype(gradient.dtype)).item()


def _look(evaluator: LossEvaluator, method: Method[Any], state: Any, due: bool) -> tuple[tuple[Estimate, ...], Any]:
    """What the method sees. Where curvature is ``due``, the first estimate has the losses at both sides and at theta."""
    if not due:
        return run_estimator(method, evaluator, state)
    if isinstance(method, CustomEstimator):
        estimates, state = method.estimate(evaluator, state)
        return (_completed(evaluator, estimates[0], method.epsilon), *estimates[1:]), state
    directions = directions_of(method, evaluator, state)
    middle = third_point(evaluator.closure, evaluator.theta, directions[0])  # before both sides: a traversal less than after
    first, *others = (evaluator.two_point(direction, method.epsilon) for direction in directions)
    return (replace(first, loss_center=middle), *others), state


def _completed(evaluator: LossEvaluator, seen: Estimate, epsilon: float) -> Estimate:
    """The estimate with the losses that its method did without. The direction is the one walked: it is not aimed again."""
    plus, minus, home = seen.loss_plus, seen.loss_minus, seen.loss_center
    if plus == home and minus is None:  # a derivative, taken at theta; a difference would be 0
        plus = loss_along(evaluator.closure, evaluator.theta, seen.direction, epsilon)
    if minus is None:
        minus = loss_along(evaluator.closure, evaluator.theta, seen.direction, -epsilon)
    if home is None:
        home = center_loss(evaluator.closure, evaluator.theta)
    return replace(seen, loss_plus=plus, loss_minus=minus, loss_center=home)


def _measured(
    control: CurvatureLR, state: CurvatureLRState, seen: Estimate, due: bool, epsilon: float
) -> tuple[float | None, CurvatureLRState]:
    """Curvature along the direction seen, and the state with it; without a third loss there is nothing to add."""
    if not due or seen.loss_minus is None or seen.loss_center is None:
        return None, state
    found = curvature(seen.loss_plus, seen.loss_minus, seen.loss_center, epsilon, control.resolution)
    return found, update_average(state, found, control.decay)
