"""HiZOO: MeZO in the metric of a diagonal curvature that the losses themselves show.

Zhao et al. 2024, arXiv:2402.15173. u = z / sqrt(H), and with c = L(theta + epsilon u) + L(theta - epsilon u)
- 2 L(theta), H <- (1 - alpha) H + alpha |c| / (2 epsilon^2) H z^2, then theta -= lr * g * z / sqrt(H) by the new H. Differs
from the released code in
- alpha, which is 0 there by default: H then stays 1, and a pass is spent for nothing,
- keeping H in float32 at least, and losses in float64: a small alpha is lost in half precision, and so is c,
- not spending a fourth pass on the loss after the step.

Under a tuner z is taken before its sigma: H is of the noise, not of the scale. A mask's zeros count as z = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate, center_loss
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    MethodInfo,
    StepContext,
    accumulation_dtype,
    check_counts,
    check_positive,
    descend,
)
from l2l.noise import Distribution, Key
from l2l.params import Direction, DirectionOperator, PerturbedParameters, dense_direction
from l2l.params.blocks import Block, Blocks
from l2l.params.engine import defer_interrupt
from l2l.params.operators import plain


@dataclass(frozen=True)
class HiZOOState:
    """H, one tensor per block."""

    curvature: tuple[Tensor, ...]


@final
class Whitened(DirectionOperator):
    """z / sqrt(H): a coordinate's mean square is 1 / H."""

    def __init__(self, curvature: Sequence[Tensor]) -> None:
        self._curvature = curvature

    def covers(self, index: int) -> bool:
        return True

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        return plain(block, key, distribution).div_(self._curvature[index].sqrt())


@final
@dataclass(frozen=True)
class HiZOO(CustomEstimator[HiZOOState]):
    """theta -= lr * g * z / sqrt(H) with a diagonal curvature H. Extra memory: H."""

    info: ClassVar = MethodInfo("Zhao et al. 2024, arXiv:2402.15173", "1P, float32 at least")
    leaves_span = True
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    smooth: float = 1e-6
    """alpha: how much of H a step renews; 0 leaves H at 1, which is MeZO. The authors' example for 13B weights has 1e-8."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth={self.smooth} must be at least 0 and below 1")

    @property
    def passes(self) -> float:
        return 1.0 + 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(block.numel * accumulation_dtype(block.tensor.dtype).itemsize for block in blocks)

    def init(self, blocks: Blocks) -> HiZOOState:
        tensors = [block.tensor.detach() for block in blocks]
        return HiZOOState(tuple(torch.ones_like(tensor, dtype=accumulation_dtype(tensor.dtype)) for tensor in tensors))

    def direction(self, blocks: Blocks, state: HiZOOState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution, shape=Whitened(state.curvature))

    def estimate(self, evaluator: LossEvaluator, state: HiZOOState) -> tuple[tuple[Estimate, ...], HiZOOState]:
        keys = [evaluator.key.with_draw(draw) for draw in range(self.num_directions)]
        directions = [self.direction(evaluator.theta.blocks, state, key) for key in keys]
        home = center_loss(evaluator.closure, evaluator.theta, evaluator.transform(directions[0]))
        seen = [evaluator.two_point(direction, self.epsilon) for direction in directions]
        return tuple(replace(estimate, loss_center=home) for estimate in seen), state

    def update_(
        self, theta: PerturbedParameters, state: HiZOOState, estimates: Sequence[Estimate], context: StepContext
    ) -> HiZOOState:
        theta.restore()  # by the H that it was walked with
        with torch.no_grad(), defer_interrupt():
            if self.smooth:
                for index in range(len(theta.blocks)):
                    self._renew_(state.curvature[index], theta.blocks, index, estimates)
            descend(theta, estimates, context.lr)
        return state

    def _renew_(self, curvature: Tensor, blocks: Blocks, index: int, estimates: Sequence[Estimate]) -> None:
        looked = [estimate for estimate in estimates if estimate.direction.sigma[index]]
        if not looked:
            return  # it stood still: nothing was seen of it
        measured = torch.zeros_like(curvature)
        for estimate in looked:
            direction, home, minus = estimate.direction, estimate.loss_center, estimate.loss_minus
            assert home is not None and minus is not None, "looked there"
            bend = abs(estimate.loss_plus + minus - 2 * home) / (2 * self.epsilon**2)
            bare = replace(direction, sigma=(1.0,) * len(blocks), factor=1.0)  # H z^2 = (H z / sqrt(H))^2
            measured.add_(dense_direction(bare, blocks, index).mul_(curvature).square_(), alpha=bend / len(looked))
        curvature.lerp_(measured, self.smooth)
