"""MeZO-Greedy: the two-point estimate along the best of a few probes.

Jin et al. 2026, arXiv:2601.04710 (MeZO-Greedy): of M probes, MeZO's direction is the one with the lowest loss at
theta + epsilon u. Differs from the paper in reusing that loss for the estimate: M + 1 passes instead of M + 2. With one probe
it is MeZO. A two-point estimate does not depend on the direction's sign: along a linear loss the lower of two probes is no
steeper than any. From three on, the choice has an effect.
"""

from dataclasses import dataclass, field
from typing import ClassVar, final

from l2l.methods.base import CustomEstimator, Estimate, Estimates, LossEvaluator, MethodInfo, directions_of, loss_along


@final
@dataclass(frozen=True)
class Greedy(CustomEstimator[None]):
    """MeZO along the best of a few probes."""

    info: ClassVar = MethodInfo("Jin et al. 2026, arXiv:2601.04710, MeZO-Greedy")
    counts = ("probes",)
    num_directions: int = field(default=1, init=False)
    probes: int = 4
    """M, evaluated to one side."""

    @property
    def passes(self) -> float:
        return self.probes + 1.0

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[Estimates, None]:
        directions = [evaluator.transform(u) for u in directions_of(self, evaluator, state, self.probes)]
        losses = [loss_along(evaluator.closure, evaluator.theta, u, self.epsilon) for u in directions]
        plus = min(losses)
        best = directions[losses.index(plus)]
        minus = loss_along(evaluator.closure, evaluator.theta, best, -self.epsilon)
        return (Estimate(best, plus, minus, (plus - minus) / (2 * self.epsilon)),), state
