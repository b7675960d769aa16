"""Bringing moves into weights or copies of them: dense noise by traversals, the rest by one part per block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import Key, TensorSlice, NoiseTerm, add_noise
from l2l.noise.pieces import computed_in
from l2l.perturb.direction import Move
from l2l.perturb.low_rank import low_rank_parts, low_rank_rows
from l2l.perturb.part import Part
from l2l.perturb.written import dense_parts, dense_rows


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
    whole: TensorSlice, pieces: Sequence[TensorSlice], part: Part, terms: Sequence[NoiseTerm], rounding: Key | None = None
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


def copy_rows(whole: TensorSlice, pieces: Sequence[TensorSlice], into: Tensor, part: Part, terms: Sequence[NoiseTerm]) -> None:
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


def _round_once(whole: TensorSlice, pieces: Sequence[TensorSlice], part: Part, terms: Sequence[NoiseTerm], rounding: Key | None) -> None:
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
