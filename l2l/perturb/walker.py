"""What a way of walking owes Theta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import MomentRequest, Key, TensorSlice, Sums, round_scale, add_noise
from l2l.perturb.adding import add_part, parts_of, rounds, rows_part
from l2l.perturb.direction import Direction, Move
from l2l.perturb.moments import Moments
from l2l.perturb.part import Part


@dataclass(frozen=True)
class Perturbation:
    """Where theta stands: at ``home + distance * u``."""

    direction: Direction
    distance: float

    def move(self, count: int, times: float = 1.0) -> Move:
        """The move from home to there, ``times`` over."""
        return Move(self.direction, (times * self.distance,) * count)


class PerturbEngine(ABC):
    """Makes evaluations happen where theta stands, and brings moves into the stored weights."""

    @abstractmethod
    def stand(self, look: Perturbation | None, moves: Sequence[Move]) -> None:
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
        if move.direction.along_basis:
            round_scale(sum(abs(move.basis_scale(i)) for i in range(len(move.amounts))), torch.float32)


def apply_moves(
    blocks: Blocks,
    moves: Sequence[Move],
    piece: Callable[[int], TensorSlice],
    chosen: Sequence[int],
    look: Perturbation | None = None,
    rounding: Key | None = None,
) -> Sums | None:
    """One traversal of the chosen blocks: the moves in turn. With ``look``, where they end, the sums for moments.

    Blocks of which a move takes only some rows are moved by themselves. ``rounding``: key of stochastic rounding. What the
    moves add along bases comes after it, in one matrix product per block; half precision is rounded once for both.
    """
    if not chosen or not moves:
        return None
    check_finite(moves)
    sparse = {i for move in moves for i in move.rows}
    whole = [i for i in chosen if i not in sparse]
    parts = parts_of(blocks, moves, whole)
    for i in sparse & set(chosen):
        for move in moves:
            _move_rows(blocks, piece(i), move, i, rounding)
    gather = None
    if look is not None:
        home = look.direction.scales([-look.distance] * len(blocks))
        assert look.direction.centre is not None, "sums are only taken about a centre"
        gather = MomentRequest([home[i] for i in whole], [look.direction.centre[i] for i in whole])
    else:
        whole = [i for i in whole if any(move.dense(i) for move in moves)]
    apart = _add_parts_apart(parts, moves, piece, whole, rounding)
    whole = [i for i in whole if i not in apart]
    sums = add_noise([piece(i) for i in whole], [move.term(whole) for move in moves], gather, rounding)
    for i in parts.keys() - apart:
        parts[i].add_to(piece(i).flat)
    return sums


def _add_parts_apart(
    parts: Mapping[int, Part],
    moves: Sequence[Move],
    piece: Callable[[int], TensorSlice],
    dense: Sequence[int],
    rounding: Key | None,
) -> set[int]:
    """Move those blocks with a part that are of half precision, each by itself: their sum is rounded once."""
    apart = [i for i in parts if rounds(piece(i))]
    terms = [move.term(apart) for move in moves] if apart else []
    for k, i in enumerate(apart):
        own = [replace(term, scales=[term.scales[k]]) for term in terms] if i in dense else []
        add_part(piece(i), [piece(i)], parts[i], own, rounding)
    return set(apart)


def _move_rows(blocks: Blocks, whole: TensorSlice, move: Move, index: int, rounding: Key | None) -> None:
    rows = move.rows.get(index)
    width = blocks[index].numel // blocks[index].tensor.shape[0]
    pieces = [whole] if rows is None else [row_piece(whole, row, width) for row in rows.tolist()]
    part = rows_part(blocks, index, move, rows)
    if part is not None:
        add_part(whole, pieces, part, [move.term([index])] if move.dense(index) else [], rounding)
    elif move.dense(index):
        add_noise(pieces, [move.term([index] * len(pieces))], rounding=rounding)


def row_piece(whole: TensorSlice, row: int, width: int, into: Tensor | None = None) -> TensorSlice:
    """One row of a block of rows of ``width``."""
    span = slice(row * width, (row + 1) * width)
    master = None if whole.master is None else whole.master[span]
    return TensorSlice(whole.flat[span], whole.name, whole.offset + row * width, into, master)
