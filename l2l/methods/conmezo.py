"""ConMeZO: MeZO in a cone around momentum.

Behric et al. 2025, arXiv:2511.02757. z = sqrt(d) cos(angle) m / |m| + sin(angle) u over all blocks together, u being plain
noise and d the number of coordinates; theta -= lr * g * z, and m <- beta m + (1 - beta) g z. As long as there is no momentum, z
is u: the first step is MeZO's. Beta is warmed up as in the released code: 0.1 for a tenth of ``warm_up``, then up to its value
by a curve that is steep first. Differs from that code in that |m| is measured, not carried along by a recurrence that holds
on average alone, and that m begins at 0, not at noise.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from l2l.methods import base
from l2l.methods.base import Block, Blocks, Direction, Distribution, Estimates, Key, PerturbedParameters, StepContext
from l2l.noise import NoiseTerm, TensorSlice, add_noise, standard_deviation

FIRST = 0.1
"""Beta before it rises, and the fraction of the warm-up before that."""
SOFTNESS, STEEPNESS, POWER = 1.8, 8.0, 3.0
"""Of the rise: beta - (beta - FIRST) / (1 + STEEPNESS * progress ** SOFTNESS) ** POWER."""


@dataclass(frozen=True)
class ConMeZOState:
    """Momentum of every block, of its shape and at least float32."""

    momenta: tuple[torch.Tensor, ...]


@final
class Cone(base.DirectionOperator):
    """sqrt(d) cos(angle) m_b / |m| + sin(angle) u_b; mean square 1 over all blocks together.

    Args:
        norm: |m| over all blocks.
        count: d.
    """

    def __init__(self, momenta: tuple[torch.Tensor, ...], norm: float, count: int, angle: float) -> None:
        self._momenta = momenta
        self._along, self._across = math.sqrt(count) * math.cos(angle) / norm, math.sin(angle)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> torch.Tensor:
        out = self._momenta[index] * self._along
        scale = self._across / standard_deviation(distribution)
        add_noise([TensorSlice(out.view(-1), block.name)], [NoiseTerm(key, [(scale,)], distribution)])
        return out


@final
@dataclass(frozen=True)
class ConMeZO(base.Method[ConMeZOState]):
    """MeZO in a cone around momentum."""

    info: ClassVar = base.MethodInfo("Behric et al. 2025, arXiv:2511.02757", "1P, at least float32")
    accumulates = 1
    positive = ("angle",)
    fractions = ("beta",)
    angle: float = 1.35
    """Between direction and momentum, in radians, 0 to pi / 2; pi / 2: MeZO."""
    beta: float = 0.99
    """Decay of momentum, after the warm-up."""
    warm_up: int = 2000
    """Steps of the warm-up; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_counts(0, warm_up=self.warm_up)
        if self.angle > math.pi / 2:
            raise ValueError(f"angle={self.angle} must be at most pi / 2, in radians")

    def init(self, blocks: Blocks) -> ConMeZOState:
        return ConMeZOState(base.accumulators(blocks))

    def direction(self, blocks: Blocks, state: ConMeZOState, key: Key) -> Direction:
        norm = math.sqrt(sum(torch.linalg.vector_norm(m).item() ** 2 for m in state.momenta))
        return self.unit_direction(blocks, key, Cone(state.momenta, norm, blocks.numel, self.angle) if norm else None)

    def beta_at(self, step: int) -> float:
        """Beta of a step, counted from 0."""
        begin = FIRST * self.warm_up
        if step >= self.warm_up:
            return self.beta
        first = min(FIRST, self.beta)
        progress = max(0.0, (step - begin) / (self.warm_up - begin))
        return self.beta - (self.beta - first) / (1 + STEEPNESS * progress**SOFTNESS) ** POWER

    def update_(
        self, theta: PerturbedParameters, state: ConMeZOState, estimates: Estimates, context: StepContext
    ) -> ConMeZOState:
        beta, blocks = self.beta_at(context.key.step), theta.blocks

        def step(index: int) -> torch.Tensor:
            found = base.gradient(blocks, index, estimates)  # before momentum changes: the direction is made of it
            state.momenta[index].mul_(beta).add_(found, alpha=1 - beta)
            return found

        theta.add_dense_each(step, [-rate for rate in context.lr])
        return state
