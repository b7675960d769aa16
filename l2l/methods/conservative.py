"""ZO-SGD-Cons: a step is taken only where the batch's own loss falls by it.

Zhang et al. 2024, arXiv:2402.11592, after Kim et al. 2021, arXiv:2109.13391: of theta, theta - lr * g * u and
theta + lr * g * u, the one with the smallest loss becomes theta; where two are equal, the first of them. Differs from the
benchmark's code in that a candidate that loses leaves no trace (the code steps back by stepping the opposite way, which
rounding and weight decay make another step), that decay comes after the choice, and that the loss reported is of the looks
at both sides and never that of a candidate which was given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from l2l.estimators.finite_difference import Estimate, finite_loss
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    MethodInfo,
    StepContext,
    check_counts,
    check_positive,
    gradient,
)
from l2l.noise import Distribution, Key
from l2l.params import Direction, DirectionOperator, PerturbedParameters
from l2l.params.blocks import Block, Blocks


@final
class MeanEstimate(DirectionOperator):
    """The mean of g * u over several directions: of no set mean square."""

    def __init__(self, blocks: Blocks, estimates: Sequence[Estimate]) -> None:
        self._blocks, self._estimates = blocks, estimates

    def covers(self, index: int) -> bool:
        return True

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        return gradient(self._blocks, index, self._estimates)


@final
@dataclass(frozen=True)
class Conservative(CustomEstimator[None]):
    """The best of theta and a MeZO step down or up, by the batch's loss. Extra memory: none."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592 (ZO-SGD-Cons); Kim et al. 2021", "0P")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions + 1 + self.passes_once

    @property
    def passes_once(self) -> float:
        """The two candidates."""
        return 2.0

    def state_bytes(self, blocks: Blocks) -> int:
        return 0

    def init(self, blocks: Blocks) -> None:
        return None

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[tuple[Estimate, ...], None]:
        keys = [evaluator.key.with_draw(draw) for draw in range(self.num_directions)]
        directions = [self.direction(evaluator.theta.blocks, state, key) for key in keys]
        home = evaluator.center()
        seen = (evaluator.two_point(direction, self.epsilon) for direction in directions)
        return tuple(replace(estimate, loss_center=home) for estimate in seen), state

    def update_(
        self, theta: PerturbedParameters, state: None, estimates: Sequence[Estimate], context: StepContext
    ) -> None:
        """Look at both candidates along one direction, and move to the one that is chosen: nothing is walked back."""
        step, length = candidate(theta.blocks, estimates, context.lr)
        best, chosen = estimates[0].loss_center, 0.0
        assert best is not None, "the look took it"
        for distance in (-length, length):
            theta.perturb(step, distance)
            loss = finite_loss(context.closure)
            if loss < best:
                best, chosen = loss, distance
        if chosen:
            theta.add(step, [chosen] * len(theta.blocks))


def candidate(blocks: Blocks, estimates: Sequence[Estimate], lr: Sequence[float]) -> tuple[Direction, float]:
    """A direction and a distance with direction * distance = lr * (mean of g * u), each block's own lr in its scale."""
    first = estimates[0].direction
    if len(estimates) > 1:
        return Direction(first.key, tuple(lr), shape=MeanEstimate(blocks, estimates)), 1.0
    sigma = tuple(rate * sigma for rate, sigma in zip(lr, first.sigma, strict=True))
    inside = tuple(rate * sigma for rate, sigma in zip(lr, first.basis_sigma, strict=False))
    return replace(first, sigma=sigma, basis_sigma=inside, centre=None), estimates[0].projected_gradient
