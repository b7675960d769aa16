"""LOZO: MeZO along matrices of low rank, whose row space stays for a while.

Chen et al. 2024, arXiv:2410.07698, Algorithm 1. A matrix [m, n] moves along U V^T / sqrt(r), U [m, r] fresh at every step
and V [n, r] redrawn every ``interval`` steps; other blocks along plain noise. Differs from the paper in the factor: 1 / sqrt(r)
makes a coordinate's variance 1 as MeZO's is, so that epsilon does not depend on the rank; the step is the paper's, which
divides by r in the update alone. Differs from the released code in that U is the same in perturbation and update where V
is redrawn too, because each has a stream of its own. V is made anew from its key whenever it is needed: nothing is kept.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from l2l.methods.base import Block, Blocks, Direction, DirectionOperator, Distribution, Key, Method, MethodInfo, key_since
from l2l.params.operators import factor, matrices, product, sides


@final
class LowRank(DirectionOperator):
    """U V^T / sqrt(r) with a V that several steps share.

    Args:
        since: the key that V is drawn by.
    """

    def __init__(self, blocks: Blocks, rank: int, since: Key) -> None:
        self.rank, self.since = rank, since
        self._matrices = matrices(blocks)

    def covers(self, index: int) -> bool:
        return index in self._matrices

    def left(self, block: Block, key: Key, distribution: Distribution) -> Tensor:
        """U [m, r]."""
        return factor(block, "rows", key, (sides(block)[0], self.rank), distribution)

    def right(self, block: Block, distribution: Distribution) -> Tensor:
        """V [n, r]."""
        return factor(block, "columns", self.since, (sides(block)[1], self.rank), distribution)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        u = self.left(block, key, distribution).div_(math.sqrt(self.rank))
        return product(u, self.right(block, distribution)).view(block.tensor.shape)


@final
@dataclass(frozen=True)
class LOZO(Method[None]):
    """MeZO along matrices of low rank, whose row space stays for a while."""

    info: ClassVar = MethodInfo("Chen et al. 2024, arXiv:2410.07698, Algorithm 1")
    counts = ("rank", "interval")
    rank: int = 2
    """Rank of a matrix's direction."""
    interval: int = 50
    """Steps that share a V."""

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return self.unit_direction(blocks, key, LowRank(blocks, self.rank, key_since(key, self.interval)))
