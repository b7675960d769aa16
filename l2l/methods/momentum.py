"""ZO-SGD-MMT: MeZO whose estimates gather momentum.

Zhang et al. 2024, arXiv:2402.11592. The convention is that of ``torch.optim.SGD`` without dampening or Nesterov:
buffer = momentum * buffer + g * u, theta -= lr * buffer, with a buffer of zeros before the first step. Steps are therefore
1 / (1 - momentum) times as long as MeZO's once the buffer has filled; momentum 0 is MeZO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, accumulation_dtype, check_counts, check_positive, gradient
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks


@dataclass(frozen=True)
class MomentumState:
    """A tensor per block."""

    buffer: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Momentum(Method[MomentumState]):
    """SGD with momentum on MeZO's estimates. Extra memory: one copy, at least float32."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592 (ZO-SGD-MMT)", "1P")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    momentum: float = 0.9
    """What the buffer keeps of itself at each step."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(block.numel * accumulation_dtype(block.tensor.dtype).itemsize for block in blocks)

    def init(self, blocks: Blocks) -> MomentumState:
        return MomentumState(
            tuple(torch.zeros_like(b.tensor, dtype=accumulation_dtype(b.tensor.dtype)) for b in blocks)
        )

    def direction(self, blocks: Blocks, state: MomentumState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def update_(
        self, theta: PerturbedParameters, state: MomentumState, estimates: Sequence[Estimate], context: StepContext
    ) -> MomentumState:
        def delta(index: int) -> Tensor:
            return state.buffer[index].mul_(self.momentum).add_(gradient(theta.blocks, index, estimates))

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return state
