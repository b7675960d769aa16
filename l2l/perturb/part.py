"""What a move adds to a block beside the noise that a traversal adds: in one piece per block, made when it is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

RUN = 2**20
"""Elements of half-precision rows that are widened at a time: memory of a few MiB, whatever the block's size."""


class Part(ABC):
    """What is added to the rows of a block, in the precision that the block is computed in."""

    rows: Tensor | None
    """Which rows of the block, on its device; None: all."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Elements of a row."""

    @abstractmethod
    def packed(self) -> Part:
        """The same for a tensor that holds nothing but the rows, in their order."""

    @abstractmethod
    def add_to(self, flat: Tensor) -> None:
        """Add to the block's weights [m * n], float32 or float64, in place."""

    @abstractmethod
    def widened(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first of the rows, the rows [count, n] with the part added, in full precision), some at a time."""
