"""MeZO-Greedy: of a few probes, MeZO looks along the one that has the lowest loss.

Jin et al. 2026, arXiv:2601.04710 (MeZO-Greedy). Differs from it in not asking twice for the loss that the chosen probe
has shown already: M + 1 passes see what M + 2 would. With one probe it is MeZO. An estimate to both sides is blind to
the direction's sign: along a linear loss the lowest of two probes is no steeper than any. From three on, the choice
tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from l2l.estimators.finite_difference import Estimate, loss_along
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
class Greedy(CustomEstimator[None]):
    """MeZO along the best of a few probes. Extra memory: none."""

    info: ClassVar = MethodInfo("Jin et al. 2026, arXiv:2601.04710, MeZO-Greedy", "0P")
    epsilon: float = 1e-3
    distribution: Distribution = "gaussian"
    probes: int = 4
    """M, evaluated to one side."""
    num_directions: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(probes=self.probes)

    @property
    def passes(self) -> float:
        return self.probes + 1.0

    def state_bytes(self, blocks: Blocks) -> int:
        return 0

    def init(self, blocks: Blocks) -> None:
        return None

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[tuple[Estimate, ...], None]:
        keys = [evaluator.key.with_draw(probe) for probe in range(self.probes)]
        blocks, epsilon = evaluator.theta.blocks, self.epsilon
        directions = [evaluator.transform(self.direction(blocks, state, key)) for key in keys]
        losses = [loss_along(evaluator.closure, evaluator.theta, direction, epsilon) for direction in directions]
        plus = min(losses)
        best = directions[losses.index(plus)]
        minus = loss_along(evaluator.closure, evaluator.theta, best, -epsilon)
        return (Estimate(best, plus, minus, (plus - minus) / (2 * epsilon)),), state

    def update_(
        self, theta: PerturbedParameters, state: None, estimates: Sequence[Estimate], context: StepContext
    ) -> None:
        descend(theta, estimates, context.lr)
