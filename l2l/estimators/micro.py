"""The loss of a batch from pieces of it, one after the other: the memory of a piece, the number of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from l2l.estimators.base import Closure


@final
@dataclass(frozen=True)
class MicroBatched:
    """A closure that adds up pieces; each is weighted already, so that the sum is the loss of the whole batch.

    Where gradients are off, as in looks along a direction, each piece's activations are freed before the next begins.
    A backward pass reads ``pieces`` and goes back through each by itself; one through the sum keeps them all.
    """

    pieces: tuple[Closure, ...]
    whole: Closure | None = None
    """Adds them up in its own way; None: one after the other."""

    def __call__(self) -> Tensor | float:
        if self.whole is not None:
            return self.whole()
        first, *rest = self.pieces
        total = first()
        for piece in rest:
            total = total + piece()
        return total


def pieces_of(closure: Closure) -> tuple[Closure, ...]:
    """What adds up to the closure's loss: the closure itself where it is not micro-batched."""
    return closure.pieces if isinstance(closure, MicroBatched) else (closure,)
