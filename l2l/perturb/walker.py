"""What a way of walking owes Theta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import Gather, Key, Piece, Sums, round_scale, traverse
from l2l.perturb.direction import Direction, Move
from l2l.perturb.moments import Moments


@dataclass(frozen=True)
class Look:
    """Where theta stands: at ``home + distance * u``."""

    direction: Direction
    distance: float

    def move(self, count: int, times: float = 1.0) -> Move:
        """The move from home to there, ``times`` over."""
        return Move(self.direction, (times * self.distance,) * count)


class Walker(ABC):
    """Makes evaluations happen where theta stands, and brings moves into the stored weights."""

    @abstractmethod
    def stand(self, look: Look | None, moves: Sequence[Move]) -> None:
        """Make the moves; from now on evaluations happen at home + look."""

    @abstractmethod
    def commit(self, moves: Sequence[Move], undoable: bool) -> None:
        """Stand at home, with the moves in the stored weights. ``undoable``: :meth:`revert` may be asked for."""

    @abstractmethod
    def revert(self, moves: Sequence[Move]) -> None:
        """Take back what was committed, the last first."""

    @abstractmethod
    def begin(self) -> None:
        """A step begins: weights that were written from outside are taken as they are."""

    @abstractmethod
    def finish(self) -> None:
        """A step has ended well: nothing of it will be reverted."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[Any]:
        """Inside it, whatever reads a parameter reads it where theta stands."""

    @abstractmethod
    def touched(self) -> dict[int, Tensor]:
        """For each sparse block, the rows that evaluations have looked up since this was last asked."""

    @abstractmethod
    def moments(self, direction: Direction, moves: Sequence[Move]) -> Moments | None:
        """Of the blocks at home once the moves are made; None where that can only be told at home, after them."""

    @abstractmethod
    def value(self, index: int) -> Tensor:
        """The weights of a block in the precision they are kept in, sharing memory with them."""

    @abstractmethod
    def rewrite(self, index: int, change: Callable[[Tensor], Any]) -> None:
        """Let ``change`` write the weights of a block in place, in the precision they are kept in."""

    @abstractmethod
    def extra_state(self) -> dict[str, Tensor]:
        """Tensors by block name that resuming needs beside the model's own weights."""

    @abstractmethod
    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`extra_state`."""


def check_finite(moves: Sequence[Move]) -> None:
    """Raise ValueError if a move's scale is not finite: before any block moves."""
    for move in moves:
        round_scale(sum(map(abs, move.direction.scales(move.amounts))), torch.float32)


def make_moves(
    blocks: Blocks,
    moves: Sequence[Move],
    piece: Callable[[int], Piece],
    chosen: Sequence[int],
    look: Look | None = None,
    rounding: Key | None = None,
) -> Sums | None:
    """One traversal of the chosen blocks: the moves in turn. With ``look``, where they end, the sums for moments.

    Blocks of which a move takes only some rows are moved by themselves. ``rounding``: key of stochastic rounding.
    """
    if not chosen or not moves:
        return None
    check_finite(moves)
    sparse = {i for move in moves for i in move.rows}
    for i in sparse & set(chosen):
        for move in moves:
            _move_rows(blocks, piece(i), move, i, rounding)
    whole = [i for i in chosen if i not in sparse]
    gather = None
    if look is not None:
        home = look.direction.scales([-look.distance] * len(blocks))
        assert look.direction.centre is not None, "sums are only taken about a centre"
        gather = Gather([home[i] for i in whole], [look.direction.centre[i] for i in whole])
    else:
        whole = [i for i in whole if any(move.amounts[i] * move.direction.sigma[i] for move in moves)]
    return traverse([piece(i) for i in whole], [move.term(whole) for move in moves], gather, rounding)


def _move_rows(blocks: Blocks, whole: Piece, move: Move, index: int, rounding: Key | None) -> None:
    if not move.amounts[index] * move.direction.sigma[index]:
        return
    width = blocks[index].numel // blocks[index].tensor.shape[0]
    rows = move.rows.get(index)
    if rows is None:
        traverse([whole], [move.term([index])], rounding=rounding)
        return
    pieces = [row_piece(whole, row, width) for row in rows.tolist()]
    traverse(pieces, [move.term([index] * len(pieces))], rounding=rounding)


def row_piece(whole: Piece, row: int, width: int, into: Tensor | None = None) -> Piece:
    """One row of a block of rows of ``width``."""
    span = slice(row * width, (row + 1) * width)
    master = None if whole.master is None else whole.master[span]
    return Piece(whole.flat[span], whole.name, whole.offset + row * width, into, master)
