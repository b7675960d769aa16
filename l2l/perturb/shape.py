"""Directions that are more than noise of one scale per block: a mask, a low rank, a guide, a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from l2l.blocks import Block
from l2l.noise import Distribution, Key


class DirectionOperator(ABC):
    """Says what blocks move along in place of their plain noise: u_b = factor * sigma_b * s_b.

    Two are equal only where they are the same object. s_b must be the same bits each time it is asked for, as long as a
    look or a move along it may still be walked: who changes a tensor that it is made of calls ``theta.home()`` before.
    """

    @abstractmethod
    def covers(self, index: int) -> bool:
        """Whether block ``index`` has such a form; the others move along their noise."""

    @abstractmethod
    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        """s_b: a new tensor of the block's shape on its device, at least float32. It lives for one move of one block.

        A coordinate has mean square 1, or what the method's paper makes of it: then its docstring says so.
        """
