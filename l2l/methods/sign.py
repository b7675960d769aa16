"""ZO-SGD-Sign: steps whose length is the learning rate's alone, by one of two readings of "sign".

Liu et al. 2019, "signSGD via Zeroth-Order Oracle" (ICLR), take the sign of every coordinate of the estimate g * u; so does
the text of the benchmark, Zhang et al. 2024, arXiv:2402.11592. The benchmark's released code takes the sign of the scalar g
alone and keeps the Gaussian u. The two are different methods under one name, so both are here: ``element`` is the papers',
and the default; ``scalar`` is the code's. Along Rademacher noise of one direction they are the same.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from l2l.methods.base import Estimates, Method, MethodInfo, PerturbedParameters, StepContext, check_choice, gradient


@final
@dataclass(frozen=True)
class Sign(Method[None]):
    """theta -= lr * sign(g * u), or lr * sign(g) * u."""

    info: ClassVar = MethodInfo("Liu et al. 2019, ICLR; Zhang et al. 2024, arXiv:2402.11592")
    step_is_normalized = True
    reading: Literal["scalar", "element"] = "element"
    """``element``: every coordinate moves by lr, against the sign of the mean of g * u, as in the papers; what scales u (a
    tuner's sigma) then changes the evaluation, not the step. ``scalar``: the mean of sign(g) * u, as in the benchmark's
    code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reading", self.reading, ("scalar", "element"))
        object.__setattr__(self, "leaves_span", self.reading == "element")

    def update_(self, theta: PerturbedParameters, state: None, estimates: Estimates, context: StepContext) -> None:
        if self.reading == "element":
            theta.add_dense_each(lambda i: gradient(theta.blocks, i, estimates).sign_(), [-rate for rate in context.lr])
            return
        for estimate in estimates:
            weight = -sign(estimate.projected_gradient) / len(estimates)
            theta.add(estimate.direction, [weight * rate for rate in context.lr])


def sign(value: float) -> float:
    """1, -1, or 0 for a slope of 0."""
    return math.copysign(1.0, value) if value else 0.0
