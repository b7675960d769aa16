"""SubZero: MeZO inside a small subspace of every matrix, which is redrawn from time to time.

Yu et al. 2024, arXiv:2410.08989. A matrix [m, n] moves along (sqrt(m n) / r) U Z V^T with U [m, r] and V [n, r] of orthonormal
columns, redrawn every ``interval`` steps, and Z [r, r] fresh noise: a coordinate's mean square is 1. Other blocks move along
plain noise. U and V are kept, as in the paper: making them anew at every move would take a QR decomposition each time.
A matrix with a side of at most r is first reshaped to be nearly square, as the paper does with those of LoRA and prefixes;
where that is too small as well, r is its shorter side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from l2l.methods import base
from l2l.methods.base import Block, Blocks, Direction, Distribution, Estimates, Key, PerturbedParameters, StepContext
from l2l.params.operators import factor, matrices, orthonormal, product, sides


@dataclass(frozen=True)
class SubZeroState:
    """The subspaces in use."""

    subspaces: dict[int, tuple[Tensor, Tensor]]
    """U [m, r] and V [n, r] of matrices, by index of the block; empty before the first step."""
    since: int
    """The step that drew them; -1 before the first step."""


@final
class InSubspace(base.DirectionOperator):
    """(sqrt(m n) / r) U Z V^T."""

    def __init__(self, subspaces: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.subspaces = subspaces

    def covers(self, index: int) -> bool:
        return index in self.subspaces

    def core(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        """Z [r, r]."""
        return factor(block, "core", key, (self.subspaces[index][0].shape[1],) * 2, distribution)

    def expand_(self, core: Tensor, block: Block, index: int) -> Tensor:
        """(sqrt(m n) / r) U core V^T, of the block's shape; ``core`` is scaled in place."""
        u, v = self.subspaces[index]
        return product(product(u, core.mul_(math.sqrt(len(u) * len(v)) / len(core)).t()), v).view(block.tensor.shape)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        return self.expand_(self.core(block, index, key, distribution), block, index)


def sample_subspaces(
    blocks: Blocks, rank: int, key: Key, orthogonalize: Callable[[Tensor], Tensor] = orthonormal
) -> dict[int, tuple[Tensor, Tensor]]:
    """Subspaces of all matrices under ``key``: of Gaussian noise, by a QR decomposition."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for i in sorted(matrices(blocks)):
        m, n = folded(blocks[i], rank)
        r = min(rank, m, n)
        u, v = factor(blocks[i], "rows", key, (m, r)), factor(blocks[i], "columns", key, (n, r))
        found[i] = orthogonalize(u), orthogonalize(v)
    return found


def subspace_bytes(blocks: Blocks, rank: int) -> int:
    """Bytes of :func:`sample_subspaces`."""
    forms = {i: folded(blocks[i], rank) for i in matrices(blocks)}
    sizes = {i: base.accumulation_dtype(blocks[i].tensor.dtype).itemsize for i in forms}
    return sum(min(rank, m, n) * (m + n) * sizes[i] for i, (m, n) in forms.items())


def folded(block: Block, rank: int) -> tuple[int, int]:
    """(rows, columns) that a block is reshaped to: its own if both are above ``rank``, else as nearly square as can be."""
    m, n = sides(block)
    if min(m, n) > rank:
        return m, n
    short = next(d for d in range(math.isqrt(block.numel), 0, -1) if block.numel % d == 0)
    return short, block.numel // short


@final
@dataclass(frozen=True)
class SubZero(base.Method[SubZeroState]):
    """MeZO inside a small subspace of every matrix."""

    info: ClassVar = base.MethodInfo("Yu et al. 2024, arXiv:2410.08989", "r per row and column of a matrix")
    counts = ("rank", "interval")
    rank: int = 24
    """Rank of a matrix's subspace on either side."""
    interval: int = 1000
    """Steps that share a subspace."""

    def state_bytes(self, blocks: Blocks) -> int:
        return subspace_bytes(blocks, self.rank)

    def init(self, blocks: Blocks) -> SubZeroState:
        return SubZeroState({}, -1)

    def direction(self, blocks: Blocks, state: SubZeroState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, InSubspace(self._at(blocks, state, key).subspaces))

    def _at(self, blocks: Blocks, state: SubZeroState, key: Key) -> SubZeroState:
        """The state with the subspaces of the key's step: this one, or a fresh one."""
        since = base.key_since(key, self.interval)
        if since.step == state.since:
            return state
        return SubZeroState(sample_subspaces(blocks, self.rank, since), since.step)

    def update_(
        self, theta: PerturbedParameters, state: SubZeroState, estimates: Estimates, context: StepContext
    ) -> SubZeroState:
        base.descend(theta, estimates, context.lr)
        used, following = estimates[0].direction.shape, self._at(theta.blocks, state, context.key)
        # The direction's subspaces are the same bits: keeping them, and not a copy, holds them in memory once.
        return SubZeroState(used.subspaces, following.since) if isinstance(used, InSubspace) else following
