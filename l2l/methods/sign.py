"""ZO-SGD-Sign: steps whose length is the learning rate's alone, by one of two readings of "sign".

Liu et al. 2019, "signSGD via Zeroth-Order Oracle" (ICLR), take the sign of every coordinate of the estimate g * u; so does
the text of the benchmark, Zhang et al. 2024, arXiv:2402.11592. The benchmark's released code takes the sign of the scalar g
alone and keeps the Gaussian u. The two are other methods under one name, so both are here: ``element`` is the papers',
and the default; ``scalar`` is the code's. Along Rademacher noise of one draw they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, check_counts, check_positive, gradient
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks


@final
@dataclass(frozen=True)
class Sign(Method[None]):
    """theta -= lr * sign(g * u), or lr * sign(g) * u. Extra memory: none."""

    info: ClassVar = MethodInfo("Liu et al. 2019, ICLR; Zhang et al. 2024, arXiv:2402.11592", "0P")
    step_is_normalized = True
    leaves_span: bool = field(init=False)
    epsilon: float = 1e-3
    num_directions: int = 1
    """``element``: the sign of the mean of g * u. ``scalar``: the mean of sign(g) * u."""
    distribution: Distribution = "gaussian"
    reading: Literal["scalar", "element"] = "element"
    """``element``: every coordinate moves by lr, whatever u is there, as in the papers; what scales u (a tuner's sigma)
    then acts on where is looked, not on the step. ``scalar``: a step of lr along u, as in the benchmark's code."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)
        if self.reading not in ("scalar", "element"):
            raise ValueError(f"reading={self.reading!r} must be 'scalar' or 'element'")
        object.__setattr__(self, "leaves_span", self.reading == "element")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return 0

    def init(self, blocks: Blocks) -> None:
        return None

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def update_(
        self, theta: PerturbedParameters, state: None, estimates: Sequence[Estimate], context: StepContext
    ) -> None:
        if self.reading == "element":
            theta.add_dense_each(lambda i: gradient(theta.blocks, i, estimates).sign_(), [-rate for rate in context.lr])
            return
        for estimate in estimates:
            weight = -sign(estimate.projected_gradient) / len(estimates)
            theta.add(estimate.direction, [weight * rate for rate in context.lr])


def sign(value: float) -> float:
    """1, -1, or 0 where there is no slope to follow."""
    return math.copysign(1.0, value) if value else 0.0
