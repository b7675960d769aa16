"""Walking along a basis: what several moves add to a block together is one product of two thin matrices.

The noise R is made by the same traversal as dense noise, of the same exact products; W += (sum_k c_k R_k) V^T is then one
matrix product per block. So a weight that is walked in place is rounded once for the dense noise and once for this.

R and its sums are the same bits whatever the number of threads, the backend or the device, as dense noise is. The product
with V^T is what the machine's BLAS makes of it: the same bits in every run on one machine with one number of threads; the
last bit may differ elsewhere. Out, across and back are the same product times 1, -2 and 1, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks
from l2l.noise import Key, Piece, Term, traverse
from l2l.noise.pieces import computed_in
from l2l.perturb.basis import Basis, basis_name, full_precision
from l2l.perturb.direction import Move

RUN = 2**20
"""Elements of half-precision rows that are widened at a time: memory of a few MiB, whatever the block's size."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is added to the rows of a block: ``left @ right.T``, in the precision that the block is computed in."""

    left: Tensor
    """[rows, k]: noise of the moves, scaled and summed where they share a basis."""
    right: Tensor
    """[n, k]: the bases, side by side."""
    rows: Tensor | None = None
    """Which rows of the block, on its device; None: all."""

    def add_to(self, flat: Tensor) -> None:
        """Add to the block's weights [m * n], float32 or float64, in place."""
        weights = flat.view(-1, len(self.right))
        with full_precision(flat.device):
            if self.rows is None:
                weights.addmm_(self.left, self.right.t())
            else:
                weights.index_copy_(0, self.rows, weights[self.rows].addmm_(self.left, self.right.t()))

    def widened(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first of the rows, the rows [count, n] with the part added, in full precision), some at a time."""
        weights = flat.view(-1, len(self.right))
        count = max(1, RUN // len(self.right))
        for at in range(0, len(self.left), count):
            left = self.left[at : at + count]
            source = weights[at : at + count] if self.rows is None else weights[self.rows[at : at + count]]
            wide = source.to(left.dtype, copy=True)
            with full_precision(flat.device):
                wide.addmm_(left, self.right.t())
            yield at, wide


def parts_of(blocks: Blocks, moves: Sequence[Move], chosen: Sequence[int]) -> dict[int, Part]:
    """What the moves add along bases to each of the chosen blocks, whole; blocks to which they add nothing are left out.

    One traversal for all moves along one basis, whose noise is made once where they share a direction.
    """
    found: dict[int, list[Part]] = {}
    for basis in _bases(moves):
        along = [move for move in moves if move.direction.basis is basis]
        moving = [i for i in chosen if any(move.basis_scale(i) for move in along)]
        parts = {i: _empty(blocks[i], basis.vectors[i], blocks[i].tensor.shape[0]) for i in moving}
        pieces = [Piece(part.left.view(-1), basis_name(blocks[i].name)) for i, part in parts.items()]
        traverse(pieces, [move.basis_term(moving) for move in along])
        for i, part in parts.items():
            found.setdefault(i, []).append(part)
    return {i: _side_by_side(parts) for i, parts in found.items()}


def rows_part(blocks: Blocks, index: int, move: Move, rows: Tensor | None) -> Part | None:
    """What a move adds along its basis to some rows of a block, or to all; None where that is nothing."""
    basis = move.direction.basis
    if rows is None:
        return parts_of(blocks, [move], [index]).get(index)
    if basis is None or not move.basis_scale(index):
        return None
    block = blocks[index]
    part = _empty(block, basis.vectors[index], len(rows))
    rank, name = part.left.shape[1], basis_name(block.name)
    pieces = [Piece(part.left[k], name, row * rank) for k, row in enumerate(rows.tolist())]
    traverse(pieces, [move.basis_term([index] * len(pieces))])
    return replace(part, rows=rows.to(block.tensor.device))


def _bases(moves: Sequence[Move]) -> list[Basis]:
    """The bases that the moves go along, each once."""
    bases = [move.direction.basis for move in moves if move.direction.along_basis]
    return list({id(basis): basis for basis in bases if basis is not None}.values())


def _empty(block: Block, vectors: Tensor, rows: int) -> Part:
    dtype, device = computed_in(block.tensor.dtype), block.tensor.device
    left = torch.zeros(rows, vectors.shape[1], dtype=dtype, device=device)
    return Part(left, vectors.detach().to(device, dtype))


def _side_by_side(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return Part(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts], 1))


def rounds(piece: Piece) -> bool:
    """Whether the weights are of half precision: computed in float32 and rounded once."""
    return computed_in(piece.flat.dtype) != piece.flat.dtype


def add_part(
    whole: Piece, pieces: Sequence[Piece], part: Part, terms: Sequence[Term], rounding: Key | None = None
) -> None:
    """Add dense noise and the part to a block by itself; half precision is rounded once.

    Args:
        whole: the block.
        pieces: the block again, or the part's rows one by one.
        terms: dense noise, with the scales of one piece, which are those of every other; none where there is none.
    """
    if whole.master is not None:
        part.add_to(whole.master)
        traverse(pieces, _for_each(terms, len(pieces)))
    elif rounds(whole):
        _round_once(whole, pieces, part, terms, rounding)
    else:
        if terms:
            traverse(pieces, _for_each(terms, len(pieces)))
        part.add_to(whole.flat)


def copy_rows(whole: Piece, pieces: Sequence[Piece], into: Tensor, part: Part, terms: Sequence[Term]) -> None:
    """Perturbed copies of the part's rows; ``into`` [rows * n] is where the pieces say, all of it. Terms as above."""
    if rounds(whole):
        _round_once(whole, pieces, part, terms, None)
    else:
        traverse(pieces, _for_each(terms, len(pieces)))
        replace(part, rows=None).add_to(into)


def copy_blocks(pieces: Sequence[Piece], term: Term, parts: Mapping[int, Part]) -> None:
    """Perturbed copies of whole blocks, to where their pieces say. ``parts`` of some, by their place among the pieces."""
    alone = [k for k in parts if rounds(pieces[k])]
    bare = [k for k in parts if k not in alone and not any(term.scales[k])]
    dense = [k for k in range(len(pieces)) if k not in alone and k not in bare]
    traverse([pieces[k] for k in dense], [replace(term, scales=[term.scales[k] for k in dense])])
    traverse([pieces[k] for k in bare])
    for k, part in parts.items():
        into = pieces[k].into
        if k in alone:
            own = [replace(term, scales=[term.scales[k]])] if any(term.scales[k]) else []
            _round_once(pieces[k], [pieces[k]], part, own, None)
        elif into is not None:
            part.add_to(into)


def _round_once(whole: Piece, pieces: Sequence[Piece], part: Part, terms: Sequence[Term], rounding: Key | None) -> None:
    width = len(part.right)
    for at, wide in part.widened(whole.flat):
        if part.rows is None:
            some = [_read_from(wide.view(-1), whole, at * width)]
        else:
            some = [_read_from(row, pieces[at + k]) for k, row in enumerate(wide)]
        traverse(some, _for_each(terms, len(some)), rounding=rounding)


def _read_from(wide: Tensor, piece: Piece, at: int = 0) -> Piece:
    """A run of a piece that is read from ``wide``, and written rounded to where the piece is written."""
    target = piece.flat if piece.into is None else piece.into
    return Piece(target[at : at + len(wide)], piece.name, piece.offset + at, None, wide)


def _for_each(terms: Sequence[Term], count: int) -> list[Term]:
    return [replace(term, scales=list(term.scales) * count) for term in terms]
