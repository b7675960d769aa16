"""ZO-SGD-Cons: a step is taken only where the batch's own loss falls by it.

Zhang et al. 2024, arXiv:2402.11592, after Kim et al. 2021, arXiv:2109.13391: of theta, theta - lr * g * u and
theta + lr * g * u, the one with the smallest loss becomes theta; of equal ones, the first. Differs from the benchmark's code
in that a rejected candidate leaves no trace (the code steps back by stepping the opposite way, which rounding and weight decay
make another step), that decay comes after the choice, and that the loss reported is that of the two-point estimate and never
that of a rejected candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from l2l.methods import base
from l2l.methods.base import Block, Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext


@final
class MeanEstimate(base.DirectionOperator):
    """The mean of g * u over several directions: of no fixed mean square."""

    def __init__(self, blocks: Blocks, estimates: Estimates) -> None:
        self._blocks, self._estimates = blocks, estimates

    def write(self, block: Block, index: int, key: Key, distribution: base.Distribution) -> Tensor:
        return base.gradient(self._blocks, index, self._estimates)


@final
@dataclass(frozen=True)
class Conservative(base.CustomEstimator[None]):
    """The best of theta and a MeZO step down or up, by the batch's loss."""

    info: ClassVar = base.MethodInfo("Zhang et al. 2024, arXiv:2402.11592 (ZO-SGD-Cons); Kim et al. 2021")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions + 1 + self.passes_once

    @property
    def passes_once(self) -> float:
        """The two candidates."""
        return 2.0

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[Estimates, None]:
        directions = base.directions_of(self, evaluator, state)
        loss_center = evaluator.center()
        estimates = (evaluator.two_point(direction, self.epsilon) for direction in directions)
        return tuple(replace(estimate, loss_center=loss_center) for estimate in estimates), state

    def update_(self, theta: PerturbedParameters, state: None, estimates: Estimates, context: StepContext) -> None:
        """Evaluate both candidates along one direction, and move to the chosen one."""
        step, length = candidate(theta.blocks, estimates, context.lr)
        best, chosen = estimates[0].loss_center, 0.0
        assert best is not None, "set by estimate"
        for distance in (-length, length):
            theta.perturb(step, distance)
            loss = base.finite_loss(context.closure)
            if loss < best:
                best, chosen = loss, distance
        if chosen:
            theta.add(step, [chosen] * len(theta.blocks))


def candidate(blocks: Blocks, estimates: Estimates, lr: Sequence[float]) -> tuple[Direction, float]:
    """A direction and a distance with direction * distance = lr * (mean of g * u), each block's own lr in its scale."""
    one, *others = estimates
    first = one.direction
    if others:
        return Direction(first.key, tuple(lr), shape=MeanEstimate(blocks, estimates)), 1.0
    sigma = tuple(rate * sigma for rate, sigma in zip(lr, first.sigma, strict=True))
    inside = tuple(rate * sigma for rate, sigma in zip(lr, first.basis_sigma, strict=False))
    return replace(first, sigma=sigma, basis_sigma=inside, centre=None), one.projected_gradient
