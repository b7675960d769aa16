"""LOZO-M: LOZO with momentum, kept in the space of U.

Chen et al. 2024, arXiv:2410.07698, LOZO-M. N <- beta N + (1 - beta) g U [m, r] and theta -= lr * N V^T / sqrt(r); when
V is redrawn, N is first carried over by N V_old^T V_new / n. Blocks that are no matrices have ordinary momentum. Factors
are those of :mod:`l2l.methods.lozo`; so 1 / sqrt(r) here, with a g that holds another, is the paper's 1 / r. Differs from the
paper in keeping no V: both are made anew from their keys.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimates, Key, PerturbedParameters, StepContext
from l2l.methods.lozo import LowRank
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
class LOZOM(base.Method[LOZOMState]):
    """LOZO with momentum in the space of U."""

    info: ClassVar = base.MethodInfo("Chen et al. 2024, arXiv:2410.07698, LOZO-M", "r per row of a matrix, 1P of vectors")
    counts = ("rank", "interval")
    fractions = ("beta",)
    rank: int = 2
    """Rank of a matrix's direction."""
    interval: int = 50
    """Steps that share a V."""
    beta: float = 0.7
    """Decay of momentum; 0: LOZO."""

    def _momentum_shapes(self, blocks: Blocks) -> list[tuple[int, ...]]:
        found = matrices(blocks)
        return [(sides(b)[0], self.rank) if i in found else tuple(b.tensor.shape) for i, b in enumerate(blocks)]

    def state_bytes(self, blocks: Blocks) -> int:
        sizes = [base.accumulation_dtype(block.tensor.dtype).itemsize for block in blocks]
        return sum(math.prod(form) * size for form, size in zip(self._momentum_shapes(blocks), sizes, strict=True))

    def init(self, blocks: Blocks) -> LOZOMState:
        momenta = [
            torch.zeros(form, dtype=base.accumulation_dtype(block.tensor.dtype), device=block.tensor.device)
            for form, block in zip(self._momentum_shapes(blocks), blocks, strict=True)
        ]
        return LOZOMState(tuple(momenta), 0)

    def _since(self, step: int) -> int:
        return step - step % self.interval

    def direction(self, blocks: Blocks, state: LOZOMState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, LowRank(blocks, self.rank, Key(key.seed, self._since(key.step))))

    def update_(self, theta: PerturbedParameters, state: LOZOMState, estimates: Estimates, context: StepContext) -> LOZOMState:
        blocks, seed, now = theta.blocks, context.key.seed, self._since(context.key.step)
        new, old = LowRank(blocks, self.rank, Key(seed, now)), LowRank(blocks, self.rank, Key(seed, state.since))

        def delta(index: int) -> Tensor:
            momentum, block = state.momenta[index], blocks[index]
            if not new.covers(index):
                return momentum.mul_(self.beta).add_(base.gradient(blocks, index, estimates), alpha=1 - self.beta)
            right = new.right(block, self.distribution)
            if now != state.since:
                carried = product(right.t(), old.right(block, self.distribution).t()).div_(len(right))
                momentum.copy_(product(momentum, carried))
            momentum.mul_(self.beta)
            for estimate in estimates:  # + (1 - beta) * mean(g * U), U as long as it was in the evaluation
                weight = (1 - self.beta) / len(estimates) * estimate.projected_gradient
                scale = estimate.direction.factor * estimate.direction.sigma[index]
                momentum.add_(new.left(block, estimate.direction.key, self.distribution), alpha=weight * scale)
            return product(momentum, right).div_(math.sqrt(self.rank)).view(block.tensor.shape)

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return LOZOMState(state.momenta, now)
