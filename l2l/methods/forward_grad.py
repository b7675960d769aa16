"""Forward-Grad: the derivative along a random direction, exactly, by forward-mode automatic differentiation.

Baydin et al. 2022, arXiv:2202.08587; a baseline of Zhang et al. 2024, arXiv:2402.11592. There is no epsilon and
so no bias of it: MeZO with an ever smaller one comes to this. It needs a differentiable loss, weights that are not
quantised, and a forward-mode rule for every operation. Differs from the benchmark's code in that u is not stored as the
model's tangents: a block's tangent is made when the block is read, so that no copy of the weights is held; and any closure
will do, where the code calls a functional form of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from l2l.estimators.finite_difference import Estimate
from l2l.estimators.forward_mode import forward_gradient
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    MethodInfo,
    StepContext,
    check_counts,
    check_positive,
    descend,
)
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks


@final
@dataclass(frozen=True)
class ForwardGrad(CustomEstimator[None]):
    """theta -= lr * <gradient, u> * u, without finite differences. Extra memory: none."""

    info: ClassVar = MethodInfo("Baydin et al. 2022, arXiv:2202.08587", "0P")
    differentiates = True
    epsilon: float = 1e-3
    """How far the losses of ``lr="auto"`` lie from theta; the derivative itself needs none."""
    num_directions: int = 1
    distribution: Distribution = "gaussian"

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)

    @property
    def passes(self) -> float:
        """A pass with tangents costs about two without, and is counted as two."""
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return 0

    def init(self, blocks: Blocks) -> None:
        return None

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[tuple[Estimate, ...], None]:
        keys = [evaluator.key.with_draw(draw) for draw in range(self.num_directions)]
        directions = [evaluator.transform(self.direction(evaluator.theta.blocks, state, key)) for key in keys]
        return tuple(forward_gradient(evaluator.closure, evaluator.theta, direction) for direction in directions), state

    def update_(
        self, theta: PerturbedParameters, state: None, estimates: Sequence[Estimate], context: StepContext
    ) -> None:
        descend(theta, estimates, context.lr)
