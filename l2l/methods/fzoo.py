"""FZOO: several one-sided probes that share a base loss; the step is divided by how much their losses differ.

Dang et al. 2025, arXiv:2506.09034: theta -= lr * sum c_i u_i with c_i = (L_i - L0) / (N std(L_1 .. L_N)),
u_i of plus or minus one, and std over N as in the released code. Epsilon cancels, and along a linear loss so does the
length of the gradient: normalized SGD. Differs from the released code in that
- where all probes have the very same loss no step is taken (the code divides by zero; a small number added to the
  divisor would make the largest step of the run out of a rounding);
- every step has N probes of its own, as in the paper (the code has a branch that reuses the last losses, never
  reached).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from l2l.methods import base
from l2l.methods.base import Distribution, Estimates, Estimator, PerturbedParameters, StepContext


@final
@dataclass(frozen=True)
class FZOO(base.Method[None]):
    """N one-sided probes, and a step divided by the spread of their losses."""

    info: ClassVar = base.MethodInfo("Dang et al. 2025, arXiv:2506.09034")
    step_is_normalized = True
    num_directions: int = 8
    """Probes of a step, N."""
    distribution: Distribution = "rademacher"
    estimator: Estimator = field(default="one_sided", init=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_directions == 1:
            raise ValueError("num_directions=1 must be at least 2: the step is divided by the spread of the probes' losses")

    def update_(self, theta: PerturbedParameters, state: None, estimates: Estimates, context: StepContext) -> None:
        spread = deviation([estimate.loss_plus for estimate in estimates])
        if spread != 0:
            base.descend(theta, estimates, [rate * self.epsilon / spread for rate in context.lr])


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
