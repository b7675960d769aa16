"""Holding an interrupt back while theta is between two places.

What a move adds to a block beside the noise that a traversal adds: in one piece per block, made when it is needed.

Mean and variance of the weights of each block: measured, or in closed form after a step from sums taken before it.

Walking along a basis: what several moves add to a block together is one product of two thin matrices.

The noise R is made by the same traversal as dense noise, of the same exact products; W += (sum_k c_k R_k) V^T is then one
matrix product per block. So a weight that is walked in place is rounded once for the dense noise and once for this.

R and its sums are the same bits whatever the number of threads, the backend or the device, as dense noise is. The product
with V^T is what the machine's BLAS makes of it: the same bits in every run on one machine with one number of threads; the
last bit may differ elsewhere. Out, across and back are the same product times 1, -2 and 1, exactly.

Walking along a shape: what several moves add to a block together is written out, one block at a time.

Bringing moves into weights or copies of them: dense noise by traversals, the rest by one part per block.

What a way of walking owes Theta.
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from l2l.noise import Key, MomentRequest, NoiseTerm, Sums, TensorSlice, add_noise, round_scale
from l2l.noise.slices import computed_in
from l2l.params.basis import Basis, basis_name, full_precision, low_rank_noise
from l2l.params.blocks import Block, Blocks
from l2l.params.direction import Direction, Move


@contextmanager
def defer_interrupt(late: list[object] | None = None) -> Iterator[None]:
    """Hold a Ctrl-C back until the traversal is done: half a traversal could not be undone.

    Args:
        late: where one that arrives is noted instead of being raised at the end; see :func:`deliver`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[object] = [] if late is None else late
    previous = signal.signal(signal.SIGINT, lambda _signal, frame: arrived.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
        if arrived and late is None:
            raise_deferred(arrived)


def raise_deferred(arrived: list[object]) -> None:
    """Raise the interrupts that were held back."""
    if arrived:
        arrived.clear()
        signal.raise_signal(signal.SIGINT)


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


Moments = tuple[tuple[float, float], ...]
"""(mean, unbiased variance) per block; the variance of a single number is 0."""


def moments_of(sums: Sums, counts: Sequence[int], centre: Sequence[float], scale: Sequence[float]) -> Moments:
    """Moments of w + scale * u, where ``sums`` are those of d = w - centre and of the noise integers u.

    sum(d + s u) = sum d + s sum u, and sum (d + s u)^2 = sum d^2 + 2 s sum d u + s^2 sum u^2: exact for any s.
    """
    n, s = np.array(counts, dtype=np.float64), np.array(scale, dtype=np.float64)
    first = sums.d + s * sums.u
    second = sums.dd + 2 * s * sums.du + s * s * sums.uu
    mean = np.array(centre, dtype=np.float32).astype(np.float64) + first / np.maximum(n, 1)
    spread = second - first * first / np.maximum(n, 1)
    variance = np.where(spread < 0, 0.0, spread) / np.maximum(n - 1, 1)  # not maximum: a NaN is not masked
    return tuple(zip(mean.tolist(), variance.tolist(), strict=True))


def measure(
    pieces: Sequence[TensorSlice],
    centre: Sequence[float],
    terms: Sequence[NoiseTerm] = (),
    parts: Mapping[int, Part] = MappingProxyType({}),
) -> Moments:
    """Moments of the pieces with the terms added, by a traversal that writes nothing.

    Args:
        parts: what is added to some of the pieces, whole blocks, along a basis; by their place.
    """
    zero = [0.0] * len(pieces)
    plain = [k for k in range(len(pieces)) if k not in parts]
    sums = Sums(*(np.zeros(len(pieces)) for _ in range(5)))
    _put(sums, plain, _sums([pieces[k] for k in plain], [centre[k] for k in plain], [_only(t, plain) for t in terms]))
    for k, part in parts.items():
        own = [_only(term, [k]) for term in terms]
        for at, wide in part.widened(pieces[k].flat):
            run = TensorSlice(wide.view(-1), pieces[k].name, pieces[k].offset + at * wide.shape[1])
            _put(sums, [k], _sums([run], [centre[k]], own))
    return moments_of(sums, [piece.flat.numel() for piece in pieces], centre, zero)


def _sums(pieces: Sequence[TensorSlice], centre: Sequence[float], terms: Sequence[NoiseTerm]) -> Sums:
    found = add_noise(pieces, terms, MomentRequest([0.0] * len(pieces), centre), store=False)
    assert found is not None, "sums were asked for"
    return found


def _put(sums: Sums, places: Sequence[int], found: Sums) -> None:
    for name, values in vars(found).items():
        getattr(sums, name)[list(places)] += values


def _only(term: NoiseTerm, places: Sequence[int]) -> NoiseTerm:
    return replace(term, scales=[term.scales[k] for k in places])


def block_moments(blocks: Blocks) -> Moments:
    """Moments of blocks as they stand. Two traversals: the second about the mean that the first has found."""
    pieces = [TensorSlice(block.flat, block.name) for block in blocks]
    about_zero = measure(pieces, [0.0] * len(pieces))
    return measure(pieces, [mean for mean, _ in about_zero])


@final
@dataclass(frozen=True, eq=False)
class LowRank(Part):
    """``left @ right.T``."""

    left: Tensor
    """[rows, k]: noise of the moves, scaled and summed where they share a basis."""
    right: Tensor
    """[n, k]: the bases, side by side."""
    rows: Tensor | None = None

    @property
    def width(self) -> int:
        return len(self.right)

    def packed(self) -> LowRank:
        return replace(self, rows=None)

    def add_to(self, flat: Tensor) -> None:
        weights = flat.view(-1, len(self.right))
        with full_precision(flat.device):
            if self.rows is None:
                weights.addmm_(self.left, self.right.t())
            else:
                weights.index_copy_(0, self.rows, weights[self.rows].addmm_(self.left, self.right.t()))

    def widened(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        weights = flat.view(-1, len(self.right))
        count = max(1, RUN // len(self.right))
        for at in range(0, len(self.left), count):
            left = self.left[at : at + count]
            source = weights[at : at + count] if self.rows is None else weights[self.rows[at : at + count]]
            wide = source.to(left.dtype, copy=True)
            with full_precision(flat.device):
                wide.addmm_(left, self.right.t())
            yield at, wide


def low_rank_parts(blocks: Blocks, moves: Sequence[Move], chosen: Sequence[int]) -> dict[int, LowRank]:
    """What the moves add along bases to each of the chosen blocks, whole; blocks to which they add nothing are left out.

    One traversal for all moves along one basis, whose noise is made once where they share a direction.
    """
    found: dict[int, list[LowRank]] = {}
    for basis in _bases(moves):
        along = [move for move in moves if move.direction.basis is basis]
        moving = [i for i in chosen if any(move.basis_scale(i) for move in along)]
        parts = {i: _empty(blocks[i], basis.vectors[i], blocks[i].tensor.shape[0]) for i in moving}
        pieces = [TensorSlice(part.left.view(-1), basis_name(blocks[i].name)) for i, part in parts.items()]
        add_noise(pieces, [move.basis_term(moving) for move in along])
        for i, part in parts.items():
            found.setdefault(i, []).append(part)
    return {i: _side_by_side(parts) for i, parts in found.items()}


def low_rank_rows(blocks: Blocks, index: int, move: Move, rows: Tensor) -> LowRank | None:
    """What a move adds along its basis to some rows of a block; None where that is nothing."""
    basis = move.direction.basis
    if basis is None or not move.basis_scale(index):
        return None
    block = blocks[index]
    part = _empty(block, basis.vectors[index], len(rows))
    rank, name = part.left.shape[1], basis_name(block.name)
    pieces = [TensorSlice(part.left[k], name, row * rank) for k, row in enumerate(rows.tolist())]
    add_noise(pieces, [move.basis_term([index] * len(pieces))])
    return replace(part, rows=rows.to(block.tensor.device))


def _bases(moves: Sequence[Move]) -> list[Basis]:
    """The bases that the moves go along, each once."""
    bases = [move.direction.basis for move in moves if move.direction.along_basis]
    return list({id(basis): basis for basis in bases if basis is not None}.values())


def _empty(block: Block, vectors: Tensor, rows: int) -> LowRank:
    dtype, device = computed_in(block.tensor.dtype), block.tensor.device
    left = torch.zeros(rows, vectors.shape[1], dtype=dtype, device=device)
    return LowRank(left, vectors.detach().to(device, dtype))


def _side_by_side(parts: Sequence[LowRank]) -> LowRank:
    if len(parts) == 1:
        return parts[0]
    return LowRank(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts], 1))


@final
@dataclass(frozen=True, eq=False)
class DensePart(Part):
    """A tensor that is made when it is added, and let go."""

    make: Callable[[], Tensor]
    """Gives the block's change, [count of rows, width]."""
    columns: int
    rows: Tensor | None = None

    @property
    def width(self) -> int:
        return self.columns

    def packed(self) -> DensePart:
        return replace(self, rows=None)

    def add_to(self, flat: Tensor) -> None:
        weights, moved = flat.view(-1, self.width), self.make()
        if self.rows is None:
            weights.add_(moved)
        else:
            weights.index_add_(0, self.rows, moved)

    def widened(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        weights, moved = flat.view(-1, self.width), self.make()
        count = max(1, RUN // self.width)
        for at in range(0, len(moved), count):
            some = moved[at : at + count]
            source = weights[at : at + count] if self.rows is None else weights[self.rows[at : at + count]]
            yield at, source.to(some.dtype, copy=True).add_(some)


def dense_direction(direction: Direction, blocks: Blocks, index: int) -> Tensor:
    """u_b of a block written out, of its shape and at least float32: for updates that are not along directions."""
    block = blocks[index]
    if direction.shaped(index):
        return _shaped(direction, blocks, index).mul_(direction.shape_scale(index, 1.0))
    out = torch.zeros(block.tensor.shape, dtype=computed_in(block.tensor.dtype), device=block.tensor.device)
    scale = direction.scales([1.0] * len(blocks))[index]
    if scale:
        add_noise(
            [TensorSlice(out.view(-1), block.name)], [NoiseTerm(direction.key, [(scale,)], direction.distribution)]
        )
    if direction.basis is not None and direction.basis_sigma[index]:
        vectors = direction.basis.vectors[index].detach().to(out.device, out.dtype)
        along = low_rank_noise(block.name, vectors, direction.key, len(out), direction.distribution)
        out.add_(along, alpha=direction.factor * direction.basis_sigma[index])
    return out


def _shaped(direction: Direction, blocks: Blocks, index: int) -> Tensor:
    assert direction.shape is not None, "a shape covers the block"
    with torch.no_grad(), full_precision(blocks[index].tensor.device):
        return direction.shape.write(blocks[index], index, direction.key, direction.distribution)


def dense_parts(blocks: Blocks, moves: Sequence[Move], chosen: Sequence[int]) -> dict[int, DensePart]:
    """What the moves add along shapes to each of the chosen blocks; blocks to which they add nothing are left out."""
    along = [move for move in moves if move.direction.shape is not None]
    moving = [i for i in chosen if any(move.shape_scale(i) for move in along)]
    return {i: DensePart(partial(_change, blocks, along, i), _width(blocks, i)) for i in moving}


def dense_rows(blocks: Blocks, index: int, move: Move, rows: Tensor) -> DensePart | None:
    """What a move adds along its shape to some rows of a block; None where that is nothing."""
    if not move.shape_scale(index):
        return None
    rows = rows.to(blocks[index].tensor.device)
    return DensePart(lambda: _change(blocks, [move], index)[rows], _width(blocks, index), rows)


def _width(blocks: Blocks, index: int) -> int:
    tensor = blocks[index].tensor
    return tensor.shape[-1] if tensor.ndim else 1


def _change(blocks: Blocks, moves: Sequence[Move], index: int) -> Tensor:
    """The sum of the moves of one block [rows, width], each direction written once."""
    scales: list[tuple[Direction, float]] = []
    for move in moves:
        known = next((k for k, (direction, _) in enumerate(scales) if direction == move.direction), None)
        if known is None:
            scales.append((move.direction, move.shape_scale(index)))
        else:
            scales[known] = (move.direction, scales[known][1] + move.shape_scale(index))
    total: Tensor | None = None
    for direction, scale in scales:
        if scale:
            own = _shaped(direction, blocks, index).mul_(scale)
            total = own if total is None else total.add_(own)
    shape = (-1, _width(blocks, index))
    return torch.zeros_like(blocks[index].flat).view(shape) if total is None else total.view(shape)


def parts_of(blocks: Blocks, moves: Sequence[Move], chosen: Sequence[int]) -> dict[int, Part]:
    """What the moves add along bases and shapes to each of the chosen blocks, whole; others are left out.

    Raises:
        ValueError: some go along a basis and others along a shape, in one block.
    """
    along, shaped = low_rank_parts(blocks, moves, chosen), dense_parts(blocks, moves, chosen)
    both = next(iter(along.keys() & shaped.keys()), None)
    if both is not None:
        raise ValueError(
            f"block {blocks[both].name!r} would move along a basis and a shape in one step: use one of them"
        )
    return {**along, **shaped}


def rows_part(blocks: Blocks, index: int, move: Move, rows: Tensor | None) -> Part | None:
    """What a move adds along its basis or shape to some rows of a block, or to all; None where that is nothing."""
    if rows is None:
        return parts_of(blocks, [move], [index]).get(index)
    return low_rank_rows(blocks, index, move, rows) or dense_rows(blocks, index, move, rows)


def rounds(piece: TensorSlice) -> bool:
    """Whether the weights are of half precision: computed in float32 and rounded once."""
    return computed_in(piece.flat.dtype) != piece.flat.dtype


def add_part(
    whole: TensorSlice,
    pieces: Sequence[TensorSlice],
    part: Part,
    terms: Sequence[NoiseTerm],
    rounding: Key | None = None,
) -> None:
    """Add dense noise and the part to a block by itself; half precision is rounded once.

    Args:
        whole: the block.
        pieces: the block again, or the part's rows one by one.
        terms: dense noise, with the scales of one piece, which are those of every other; none where there is none.
    """
    if whole.master is not None:
        part.add_to(whole.master)
        add_noise(pieces, _for_each(terms, len(pieces)))
    elif rounds(whole):
        _round_once(whole, pieces, part, terms, rounding)
    else:
        if terms:
            add_noise(pieces, _for_each(terms, len(pieces)))
        part.add_to(whole.flat)


def copy_rows(
    whole: TensorSlice, pieces: Sequence[TensorSlice], into: Tensor, part: Part, terms: Sequence[NoiseTerm]
) -> None:
    """Perturbed copies of the part's rows; ``into`` [rows * n] is where the pieces say, all of it. Terms as above."""
    if rounds(whole):
        _round_once(whole, pieces, part, terms, None)
    else:
        add_noise(pieces, _for_each(terms, len(pieces)))
        part.packed().add_to(into)


def copy_blocks(pieces: Sequence[TensorSlice], term: NoiseTerm, parts: Mapping[int, Part]) -> None:
    """Perturbed copies of whole blocks, to where their pieces say. ``parts`` of some, by their place among the pieces."""
    alone = [k for k in parts if rounds(pieces[k])]
    bare = [k for k in parts if k not in alone and not any(term.scales[k])]
    dense = [k for k in range(len(pieces)) if k not in alone and k not in bare]
    add_noise([pieces[k] for k in dense], [replace(term, scales=[term.scales[k] for k in dense])])
    add_noise([pieces[k] for k in bare])
    for k, part in parts.items():
        into = pieces[k].into
        if k in alone:
            own = [replace(term, scales=[term.scales[k]])] if any(term.scales[k]) else []
            _round_once(pieces[k], [pieces[k]], part, own, None)
        elif into is not None:
            part.add_to(into)


def _round_once(
    whole: TensorSlice, pieces: Sequence[TensorSlice], part: Part, terms: Sequence[NoiseTerm], rounding: Key | None
) -> None:
    width = part.width
    for at, wide in part.widened(whole.flat):
        if part.rows is None:
            some = [_read_from(wide.view(-1), whole, at * width)]
        else:
            some = [_read_from(row, pieces[at + k]) for k, row in enumerate(wide)]
        add_noise(some, _for_each(terms, len(some)), rounding=rounding)


def _read_from(wide: Tensor, piece: TensorSlice, at: int = 0) -> TensorSlice:
    """A run of a piece that is read from ``wide``, and written rounded to where the piece is written."""
    target = piece.flat if piece.into is None else piece.into
    return TensorSlice(target[at : at + len(wide)], piece.name, piece.offset + at, None, wide)


def _for_each(terms: Sequence[NoiseTerm], count: int) -> list[NoiseTerm]:
    return [replace(term, scales=list(term.scales) * count) for term in terms]


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
