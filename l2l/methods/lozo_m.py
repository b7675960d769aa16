"""LOZO-M: LOZO with momentum, kept in the space of U.

Chen et al. 2024, arXiv:2410.07698, LOZO-M. N <- beta N + (1 - beta) g U [m, r] and theta -= lr * N V^T / sqrt(r); when
V is redrawn, N is first carried over by N V_old^T V_new / n. Blocks that are no matrices have ordinary momentum. Factors
are those of :mod:`l2l.methods.lozo`; so 1 / sqrt(r) here, with a g that holds another, is the paper's 1 / r. Differs from the
paper in keeping no V: both are made anew from their keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import (
    Method,
    MethodInfo,
    StepContext,
    accumulation_dtype,
    check_counts,
    check_positive,
    gradient,
)
from l2l.methods.lozo import LowRank
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Block, Blocks
from l2l.params.operators import matrices, product, sides


@dataclass(frozen=True)
class LOZOMState:
    """Momentum of every block."""

    momenta: tuple[Tensor, ...]
    """N [m, r] of matrices, of the block's shape otherwise; at least float32."""
    since: int
    """The step that drew the V to which N belongs."""


@final
@dataclass(frozen=True)
class LOZOM(Method[LOZOMState]):
    """LOZO with momentum in the space of U. Extra memory: r numbers per row of a matrix, and a copy of other blocks."""

    info: ClassVar = MethodInfo("Chen et al. 2024, arXiv:2410.07698, LOZO-M", "r per row of a matrix, 1P of vectors")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    rank: int = 2
    """Of a matrix's direction."""
    interval: int = 50
    """Steps that share a V."""
    beta: float = 0.7
    """What momentum keeps of itself at each step; 0: LOZO."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions, rank=self.rank, interval=self.interval)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta} must be at least 0 and below 1")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def _form(self, blocks: Blocks, index: int) -> tuple[int, ...]:
        """Shape of a block's momentum."""
        block = blocks[index]
        return (sides(block)[0], self.rank) if index in matrices(blocks) else tuple(block.tensor.shape)

    def state_bytes(self, blocks: Blocks) -> int:
        forms = [self._form(blocks, i) for i in range(len(blocks))]
        sizes = [accumulation_dtype(block.tensor.dtype).itemsize for block in blocks]
        return sum(math.prod(form) * size for form, size in zip(forms, sizes, strict=True))

    def init(self, blocks: Blocks) -> LOZOMState:
        forms = [self._form(blocks, i) for i in range(len(blocks))]
        momenta = [
            torch.zeros(form, dtype=accumulation_dtype(block.tensor.dtype), device=block.tensor.device)
            for form, block in zip(forms, blocks, strict=True)
        ]
        return LOZOMState(tuple(momenta), 0)

    def _shape(self, blocks: Blocks, seed: int, since: int) -> LowRank:
        return LowRank(blocks, self.rank, Key(seed, since))

    def direction(self, blocks: Blocks, state: LOZOMState, key: Key) -> Direction:
        shape = self._shape(blocks, key.seed, key.step - key.step % self.interval)
        return Direction(key, (1.0,) * len(blocks), self.distribution, shape=shape)

    def update_(
        self, theta: PerturbedParameters, state: LOZOMState, estimates: Sequence[Estimate], context: StepContext
    ) -> LOZOMState:
        blocks, seed = theta.blocks, context.key.seed
        now = context.key.step - context.key.step % self.interval
        new, old = self._shape(blocks, seed, now), self._shape(blocks, seed, state.since)

        def delta(index: int) -> Tensor:
            momentum, block = state.momenta[index], blocks[index]
            if not new.covers(index):
                return momentum.mul_(self.beta).add_(gradient(blocks, index, estimates), alpha=1 - self.beta)
            right = new.right(block, self.distribution)
            if now != state.since:
                carried = product(right.t(), old.right(block, self.distribution).t()).div_(len(right))
                momentum.copy_(product(momentum, carried))
            momentum.mul_(self.beta)
            self._gather(momentum, new, block, index, estimates)
            return product(momentum, right).div_(math.sqrt(self.rank)).view(block.tensor.shape)

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return LOZOMState(state.momenta, now)

    def _gather(
        self, momentum: Tensor, shape: LowRank, block: Block, index: int, estimates: Sequence[Estimate]
    ) -> None:
        """Add (1 - beta) * mean(g * U), U as long as it was walked."""
        for seen in estimates:
            weight = (1 - self.beta) / len(estimates) * seen.projected_gradient
            scale = seen.direction.factor * seen.direction.sigma[index]
            momentum.add_(shape.left(block, seen.direction.key, self.distribution), alpha=weight * scale)
