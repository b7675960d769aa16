"""HiZOO: MeZO in the metric of a diagonal curvature that is estimated from the losses.

Zhao et al. 2024, arXiv:2402.15173. u = z / sqrt(H), and with c = L(theta + epsilon u) + L(theta - epsilon u)
- 2 L(theta), H <- (1 - alpha) H + alpha |c| / (2 epsilon^2) H z^2, then theta -= lr * g * z / sqrt(H) by the new H. Differs
from the released code in
- alpha, which is 0 there by default: H then stays 1, and a pass is spent for nothing,
- keeping H in float32 at least, and losses in float64: a small alpha is lost in half precision, and so is c,
- not spending a fourth pass on the loss after the step.

Under a tuner z is taken before its sigma: H is of the noise, not of the scale. A mask's zeros count as z = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, final

import torch

from l2l.interrupts import complete
from l2l.methods import base
from l2l.methods.base import Block, Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.params.operators import plain


@dataclass(frozen=True)
class HiZOOState:
    """H, one tensor per block."""

    curvature: tuple[torch.Tensor, ...]


@final
class Whitened(base.DirectionOperator):
    """z / sqrt(H): a coordinate's mean square is 1 / H."""

    def __init__(self, curvature: Sequence[torch.Tensor]) -> None:
        self._curvature = curvature

    def write(self, block: Block, index: int, key: Key, distribution: base.Distribution) -> torch.Tensor:
        return plain(block, key, distribution).div_(self._curvature[index].sqrt())


@final
@dataclass(frozen=True)
class HiZOO(base.CustomEstimator[HiZOOState]):
    """theta -= lr * g * z / sqrt(H) with a diagonal curvature H."""

    info: ClassVar = base.MethodInfo("Zhao et al. 2024, arXiv:2402.15173", "1P, at least float32")
    fixed_points: ClassVar = True
    accumulates = 1
    fractions = ("smooth",)
    leaves_span = True
    smooth: float = 1e-6
    """alpha: weight of a step's curvature in H; 0 leaves H at 1, which is MeZO. The authors' example for 13B weights has
    1e-8."""

    @property
    def passes(self) -> float:
        return 1.0 + 2.0 * self.num_directions

    def init(self, blocks: Blocks) -> HiZOOState:
        return HiZOOState(tuple(tensor.fill_(1) for tensor in base.accumulators(blocks)))

    def direction(self, blocks: Blocks, state: HiZOOState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, Whitened(state.curvature))

    def estimate(self, evaluator: LossEvaluator, state: HiZOOState) -> tuple[Estimates, HiZOOState]:
        directions = base.directions_of(self, evaluator, state)
        loss_center = base.center_loss(evaluator.closure, evaluator.theta, evaluator.transform(directions[0]))
        estimates = [evaluator.two_point(direction, self.epsilon) for direction in directions]
        return tuple(replace(estimate, loss_center=loss_center) for estimate in estimates), state

    def update_(self, theta: PerturbedParameters, state: HiZOOState, estimates: Estimates, context: StepContext) -> HiZOOState:
        theta.restore()  # with the H of the evaluation, before H changes
        base.descend(theta, estimates, context.lr)  # noted now, made at the end of the step, with the H that follows
        if self.smooth:
            theta.final()
            changed = partial(self._update_curvature_, state.curvature, theta.blocks, estimates)
            with torch.no_grad():
                complete(partial(changed, index) for index in range(len(theta.blocks)))
        return state

    def _update_curvature_(self, curvatures: Sequence[torch.Tensor], blocks: Blocks, estimates: Estimates, index: int) -> None:
        curvature = curvatures[index]
        moving = [estimate for estimate in estimates if estimate.direction.sigma[index]]
        if not moving:
            return  # no estimate perturbed this block
        measured = torch.zeros_like(curvature)
        for estimate in moving:
            direction, center, minus = estimate.direction, estimate.loss_center, estimate.loss_minus
            assert center is not None and minus is not None, "set by estimate"
            bend = abs(estimate.loss_plus + minus - 2 * center) / (2 * self.epsilon**2)
            bare = replace(direction, sigma=(1.0,) * len(blocks), factor=1.0)  # H z^2 = (H z / sqrt(H))^2
            measured.add_(base.dense_direction(bare, blocks, index).mul_(curvature).square_(), alpha=bend / len(moving))
        curvature.lerp_(measured, self.smooth)
