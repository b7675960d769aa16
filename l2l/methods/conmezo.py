"""ConMeZO: MeZO in a cone around momentum.

Behric et al. 2025, arXiv:2511.02757. z = sqrt(d) cos(angle) m / |m| + sin(angle) u over all blocks together, u being plain
noise and d the number of coordinates; theta -= lr * g * z, and m <- beta m + (1 - beta) g z. As long as there is no momentum, z
is u: the first step is MeZO's. Beta is warmed up as in the released code: 0.1 for a tenth of ``warm_up``, then up to its value
by a curve that is steep first. Differs from that code in that |m| is measured, not carried along by a recurrence that holds
on average alone, and that m begins at 0, not at noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, accumulation_dtype, check_counts, check_positive, gradient
from l2l.noise import Distribution, Key, NoiseTerm, TensorSlice, add_noise, standard_deviation
from l2l.params import Direction, DirectionOperator, PerturbedParameters
from l2l.params.blocks import Block, Blocks

FIRST = 0.1
"""Beta before it rises, and the share of the warm-up that lies before."""
SOFTNESS, STEEPNESS, POWER = 1.8, 8.0, 3.0
"""Of the rise: beta - (beta - FIRST) / (1 + STEEPNESS * share ** SOFTNESS) ** POWER."""


@dataclass(frozen=True)
class ConMeZOState:
    """Momentum of every block, of its shape and at least float32."""

    momenta: tuple[Tensor, ...]


@final
class Cone(DirectionOperator):
    """sqrt(d) cos(angle) m_b / |m| + sin(angle) u_b; mean square 1 over all blocks together.

    Args:
        norm: |m| over all blocks.
        count: d.
    """

    def __init__(self, momenta: tuple[Tensor, ...], norm: float, count: int, angle: float) -> None:
        self._momenta = momenta
        self._along, self._across = math.sqrt(count) * math.cos(angle) / norm, math.sin(angle)

    def covers(self, index: int) -> bool:
        return True

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        out = self._momenta[index] * self._along
        scale = self._across / standard_deviation(distribution)
        add_noise([TensorSlice(out.view(-1), block.name)], [NoiseTerm(key, [(scale,)], distribution)])
        return out


@final
@dataclass(frozen=True)
class ConMeZO(Method[ConMeZOState]):
    """MeZO in a cone around momentum. Extra memory: a copy of the weights."""

    info: ClassVar = MethodInfo("Behric et al. 2025, arXiv:2511.02757", "1P")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    angle: float = 1.35
    """Between direction and momentum, in radians, 0 to pi / 2; pi / 2: MeZO."""
    beta: float = 0.99
    """What momentum keeps of itself at each step, after the warm-up."""
    warm_up: int = 2000
    """Steps until then; 0: none."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon, angle=self.angle)
        check_counts(num_directions=self.num_directions)
        if self.angle > math.pi / 2:
            raise ValueError(f"angle={self.angle} must be at most pi / 2, in radians")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta} must be at least 0 and below 1")
        if not isinstance(self.warm_up, int) or isinstance(self.warm_up, bool) or self.warm_up < 0:
            raise ValueError(f"warm_up={self.warm_up} must be a whole number, at least 0")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(block.numel * accumulation_dtype(block.tensor.dtype).itemsize for block in blocks)

    def init(self, blocks: Blocks) -> ConMeZOState:
        return ConMeZOState(
            tuple(
                torch.zeros_like(b.tensor, dtype=accumulation_dtype(b.tensor.dtype), requires_grad=False)
                for b in blocks
            )
        )

    def direction(self, blocks: Blocks, state: ConMeZOState, key: Key) -> Direction:
        norm = math.sqrt(sum(torch.linalg.vector_norm(m).item() ** 2 for m in state.momenta))
        cone = Cone(state.momenta, norm, blocks.numel, self.angle) if norm else None
        return Direction(key, (1.0,) * len(blocks), self.distribution, shape=cone)

    def beta_at(self, step: int) -> float:
        """Beta of a step, counted from 0."""
        begin = FIRST * self.warm_up
        if step >= self.warm_up:
            return self.beta
        first = min(FIRST, self.beta)
        share = max(0.0, (step - begin) / (self.warm_up - begin))
        return self.beta - (self.beta - first) / (1 + STEEPNESS * share**SOFTNESS) ** POWER

    def update_(
        self, theta: PerturbedParameters, state: ConMeZOState, estimates: Sequence[Estimate], context: StepContext
    ) -> ConMeZOState:
        beta, blocks = self.beta_at(context.key.step), theta.blocks

        def step(index: int) -> Tensor:
            found = gradient(blocks, index, estimates)  # before momentum changes: it is made of it
            state.momenta[index].mul_(beta).add_(found, alpha=1 - beta)
            return found

        theta.add_dense_each(step, [-rate for rate in context.lr])
        return state
