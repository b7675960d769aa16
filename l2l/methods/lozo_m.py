"""LOZO-M: LOZO with momentum, kept in the space of U.

Chen et al. 2024, arXiv:2410.07698, LOZO-M. N <- beta N + (1 - beta) g U [m, r] and theta -= lr * N V^T / sqrt(r); when
V is redrawn, N is first carried over by N V_old^T V_new / n. Blocks that are no matrices have ordinary momentum. Factors
are those of :mod:`l2l.methods.lozo`; so 1 / sqrt(r) here, with a g that holds another, is the paper's 1 / r. Differs from the
paper in keeping no V: both are made anew from their keys.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

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

    def _momentum_shapes(self, blocks: Blocks) -> dict[int, tuple[int, ...]]:
        return {i: (sides(blocks[i])[0], self.rank) for i in matrices(blocks)}

    def state_bytes(self, blocks: Blocks) -> int:
        return base.accumulator_bytes(blocks, self._momentum_shapes(blocks))

    def init(self, blocks: Blocks) -> LOZOMState:
        return LOZOMState(base.accumulators(blocks, self._momentum_shapes(blocks)), 0)

    def direction(self, blocks: Blocks, state: LOZOMState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, LowRank(blocks, self.rank, base.key_since(key, self.interval)))

    def update_(self, theta: PerturbedParameters, state: LOZOMState, estimates: Estimates, context: StepContext) -> LOZOMState:
        blocks, now = theta.blocks, base.key_since(context.key, self.interval)
        new, old = LowRank(blocks, self.rank, now), LowRank(blocks, self.rank, Key(now.seed, state.since))

        def delta(index: int) -> Tensor:
            momentum, block = state.momenta[index], blocks[index]
            if not new.covers(index):
                found = base.gradient(blocks, index, estimates)  # before momentum changes: what wants memory may fail
                return momentum.mul_(self.beta).add_(found, alpha=1 - self.beta)
            right, carried = new.right(block, self.distribution), momentum
            if now.step != state.since:
                between = product(right.t(), old.right(block, self.distribution).t()).div_(len(right))
                carried = product(momentum, between)
            mean = carried * self.beta
            for estimate in estimates:  # + (1 - beta) * mean(g * U), U as long as it was in the evaluation
                weight = (1 - self.beta) / len(estimates) * estimate.projected_gradient
                scale = estimate.direction.factor * estimate.direction.sigma[index]
                mean.add_(new.left(block, estimate.direction.key, self.distribution), alpha=weight * scale)
            moved = product(mean, right).div_(math.sqrt(self.rank)).view(block.tensor.shape)
            momentum.copy_(mean)
            return moved

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return LOZOMState(state.momenta, now.step)
