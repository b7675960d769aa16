"""Forward-Grad: the derivative along a random direction, exactly, by forward-mode automatic differentiation.

Baydin et al. 2022, arXiv:2202.08587; a baseline of Zhang et al. 2024, arXiv:2402.11592. There is no epsilon and so no bias
from it: the limit of MeZO for epsilon to 0. It needs a differentiable loss, weights that are not quantised, and a forward-mode
rule for every operation. Differs from the benchmark's code in that u is not stored as the model's tangents: a block's tangent
is made when the block is read, so that no copy of the weights is held; and any closure will do, where the code calls a
functional form of the model.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from l2l.estimators import forward_gradient
from l2l.methods.base import CustomEstimator, Direction, Estimate, Estimates, LossEvaluator, MethodInfo, directions_of


@final
@dataclass(frozen=True)
class ForwardGrad(CustomEstimator[None]):
    """theta -= lr * <gradient, u> * u, without finite differences. A pass with tangents is counted as two.

    ``epsilon`` is used by ``lr="auto"`` alone, for its losses beside theta.
    """

    info: ClassVar = MethodInfo("Baydin et al. 2022, arXiv:2202.08587")
    differentiates = True

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[Estimates, None]:
        directions = [evaluator.transform(direction) for direction in directions_of(self, evaluator, state)]
        return tuple(self._derivative(evaluator, direction) for direction in directions), state

    def _derivative(self, evaluator: LossEvaluator, direction: Direction) -> Estimate:
        evaluator.theta.perturb(direction, 0.0)

        def read() -> tuple[float, float]:
            found = forward_gradient(evaluator.closure, evaluator.theta, direction)
            return found.loss_plus, found.projected_gradient

        loss, slope = evaluator.reading(read)
        return Estimate(direction, loss, None, slope, loss)
