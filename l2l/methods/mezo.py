"""MeZO: SGD along random directions, in the memory of inference.

Malladi et al. 2023, arXiv:2305.17333, Algorithm 1 (Algorithm 2 for several draws). Differs from it in keying the
noise by block name and element, not by a global seed, so that frozen or reordered parameters cannot shift the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, check_counts, check_positive, descend
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks


@final
@dataclass(frozen=True)
class MeZO(Method[None]):
    """theta -= lr * g * z with z of unit variance in every coordinate. Extra memory: none."""

    info: ClassVar = MethodInfo("Malladi et al. 2023, arXiv:2305.17333, Algorithm 1", "0P")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    """``gaussian`` noise, or ``rademacher``: plus or minus one."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)

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
        descend(theta, estimates, context.lr)
