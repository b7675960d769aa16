"""Moves brought into weights, or into copies of them.

Dense noise of all blocks is added in one traversal. What a direction adds beside it, along a basis or by an operator, is
one :class:`Part` per block; a direction without them, as that of MeZO, costs nothing here. Weights of full precision are
rounded once for the noise and once for the part, half precision once for both.

The noise R of a basis is made as dense noise is and has the same bits on every device and number of threads. Its product
with V^T is the BLAS library's: equal in every run on one machine with one number of threads; the last bit may differ
elsewhere. To +epsilon, on to -epsilon and back are the same product times 1, -2 and 1, exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import final

import numpy as np
import torch

from l2l.interrupts import complete
from l2l.noise import Key, MomentRequest, NoiseTerm, Sums, TensorSlice, add_noise, computed_in
from l2l.params.blocks import Block, Blocks
from l2l.params.direction import Direction, Move, basis_name, full_precision, low_rank_noise
from l2l.params.shards import shard_slices, sums_of_blocks

RUN = 2**20
"""Elements of half-precision rows that are widened at a time: memory of a few MiB, whatever the block's size."""


@final
@dataclass(frozen=True, eq=False)
class Part:
    """What is added to a block beside dense noise, in the precision that the block is computed in."""

    open: Callable[[], Callable[[torch.Tensor, int], object]]
    """Prepares the part, and gives ``add(weights, at)``: adds its rows from ``at`` on to ``weights`` [count, width]. What it
    holds is freed with ``add``: a part that is written out lives for one block only."""
    height: int
    """Rows of the part."""
    width: int
    """Elements of a row."""
    rows: torch.Tensor | None = None
    """Which rows of the block, each once, on its device; None: all."""

    def add_to(self, flat: torch.Tensor, packed: bool = False) -> None:
        """Add to weights [m * n], float32 or float64, in place. ``packed``: they hold nothing but the rows, in order."""
        weights, add = flat.view(-1, self.width), self.open()
        with full_precision(flat.device):
            if self.rows is None or packed:
                add(weights, 0)
            else:
                add(chosen := weights[self.rows], 0)
                weights.index_copy_(0, self.rows, chosen)

    def widened(self, flat: torch.Tensor) -> Iterator[Callable[[], tuple[int, torch.Tensor]]]:
        """Functions that give (first of the rows, the rows [count, n] with the part added, in full precision), some at a
        time."""
        weights, add, count = flat.view(-1, self.width), self.open(), max(1, RUN // self.width)

        def widen(at: int) -> tuple[int, torch.Tensor]:
            span = slice(at, min(at + count, self.height))
            wide = weights[span if self.rows is None else self.rows[span]].to(computed_in(flat.dtype), copy=True)
            with full_precision(flat.device):
                add(wide, at)
            return at, wide

        for at in range(0, self.height, count):
            yield partial(widen, at)


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
        parts: what is added to some of the pieces, which are whole blocks; by their place.
    """
    totals = Sums(*(np.zeros(len(pieces)) for _ in range(5)))

    def gather(places: Sequence[int], read: Sequence[TensorSlice]) -> None:
        wanted = MomentRequest([0.0] * len(places), [centre[k] for k in places])
        sums = add_noise(read, [_only(term, places) for term in terms], wanted, store=False)
        for name, values in vars(sums).items():
            getattr(totals, name)[list(places)] += values

    plain = [k for k in range(len(pieces)) if k not in parts]
    gather(plain, [pieces[k] for k in plain])
    for k, part in parts.items():
        for widen in part.widened(pieces[k].flat):
            at, wide = widen()
            gather([k], [TensorSlice(wide.view(-1), pieces[k].name, pieces[k].offset + at * wide.shape[1])])
    return moments_of(totals, [piece.flat.numel() for piece in pieces], centre, [0.0] * len(pieces))


def _only(term: NoiseTerm, places: Sequence[int]) -> NoiseTerm:
    return replace(term, scales=[term.scales[k] for k in places])


def block_moments(blocks: Blocks) -> Moments:
    """Moments of the blocks' present values. Two traversals: the second about the mean that the first has found."""
    about_zero = measure_blocks(blocks, [0.0] * len(blocks))
    return measure_blocks(blocks, [mean for mean, _ in about_zero])


def measure_blocks(blocks: Blocks, centre: Sequence[float]) -> Moments:
    """Moments of the blocks' present values, of sharded ones too, by a traversal about a number near each block's mean."""
    if not blocks.sharded:
        return measure([TensorSlice(block.flat, block.name) for block in blocks], centre)
    still = [0.0] * len(blocks)
    sums = sums_of_blocks([(block.name, block.tensor) for block in blocks], (), MomentRequest(still, centre))
    return moments_of(sums, [block.numel for block in blocks], centre, still)


def sums_at(blocks: Blocks, at: "Perturbation") -> Sums:
    """The sums that a traversal to ``at`` takes of its blocks, taken of sharded ones in a traversal of their own."""
    restoring, centre = at.direction.scales([-at.distance] * len(blocks)), at.direction.centre
    assert centre is not None, "sums are only taken about a centre"
    u = NoiseTerm(at.direction.key, [(0.0,)] * len(blocks), at.direction.distribution)
    return sums_of_blocks([(block.name, block.tensor) for block in blocks], [u], MomentRequest(restoring, centre))


def _low_rank(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor | None = None) -> Part:
    """The part sum(left @ right.T), each left [rows, r] and right [n, r]: one product, of the pairs side by side."""
    left, right = pairs[0] if len(pairs) == 1 else (torch.cat([pair[side] for pair in pairs], 1) for side in (0, 1))
    return Part(lambda: lambda w, at: w.addmm_(left[at : at + len(w)], right.t()), len(left), len(right), rows)


def _factors(block: Block, vectors: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty left factor [rows, r] for the noise R, and the basis in the precision computed in."""
    dtype, device = computed_in(block.tensor.dtype), block.tensor.device
    return torch.zeros(rows, vectors.shape[1], dtype=dtype, device=device), vectors.detach().to(device, dtype)


def dense_direction(direction: Direction, blocks: Blocks, index: int) -> torch.Tensor:
    """u_b of a block written out, of its shape and at least float32: for updates that are not along directions."""
    block = blocks[index]
    if direction.shaped(index):
        return _shaped(direction, blocks, index).mul_(direction.factor * direction.sigma[index])
    out = torch.zeros(block.tensor.shape, dtype=computed_in(block.tensor.dtype), device=block.tensor.device)
    scale = direction.scales([1.0] * len(blocks))[index]
    if scale:
        add_noise([TensorSlice(out.view(-1), block.name)], [NoiseTerm(direction.key, [(scale,)], direction.distribution)])
    if direction.basis is not None and direction.basis_sigma[index]:
        vectors = direction.basis.vectors[index].detach().to(out.device, out.dtype)
        along = low_rank_noise(block.name, vectors, direction.key, len(out), direction.distribution)
        out.add_(along, alpha=direction.factor * direction.basis_sigma[index])
    return out


def _shaped(direction: Direction, blocks: Blocks, index: int) -> torch.Tensor:
    assert direction.shape is not None, "a shape covers the block"
    with torch.no_grad(), full_precision(blocks[index].tensor.device):
        return direction.shape.write(blocks[index], index, direction.key, direction.distribution)


def parts_of(blocks: Blocks, moves: Sequence[Move], chosen: Sequence[int]) -> dict[int, Part]:
    """What the moves add along bases and by operators to each of the chosen blocks, whole; others are left out.

    Raises:
        ValueError: some go along a basis and others by an operator, in one block.
    """
    factors: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    bases = [move.direction.basis for move in moves if move.direction.along_basis]
    for basis in {id(basis): basis for basis in bases if basis is not None}.values():  # one traversal for all along it
        along = [move for move in moves if move.direction.basis is basis]
        moving = [i for i in chosen if any(move.basis_scale(i) for move in along)]
        pairs = {i: _factors(blocks[i], basis.vectors[i], blocks[i].tensor.shape[0]) for i in moving}
        pieces = [TensorSlice(left.view(-1), basis_name(blocks[i].name)) for i, (left, _) in pairs.items()]
        add_noise(pieces, [move.basis_term(moving) for move in along])
        for i, pair in pairs.items():
            factors.setdefault(i, []).append(pair)
    found = {i: _low_rank(pairs) for i, pairs in factors.items()}
    by_operator = [move for move in moves if move.direction.shape is not None]
    for i in chosen if by_operator else ():
        if any(move.shape_scale(i) for move in by_operator):
            if i in found:
                raise ValueError(f"block {blocks[i].name!r} would move along a basis and a shape in one step: use one of them")
            found[i] = _written_out(blocks, by_operator, i)
    return found


def rows_part(blocks: Blocks, index: int, move: Move, rows: torch.Tensor | None) -> Part | None:
    """What a move adds along its basis or by its operator to some rows of a block, or to all; None where that is nothing."""
    if rows is None:
        return parts_of(blocks, [move], [index]).get(index)
    block, basis = blocks[index], move.direction.basis
    on_device = rows.to(block.tensor.device)
    if basis is not None and move.basis_scale(index):
        left, right = _factors(block, basis.vectors[index], len(rows))
        rank, name = left.shape[1], basis_name(block.name)
        pieces = [TensorSlice(left[k], name, row * rank) for k, row in enumerate(rows.tolist())]
        add_noise(pieces, [move.basis_term([index] * len(pieces))])
        return _low_rank([(left, right)], on_device)
    return _written_out(blocks, [move], index, on_device) if move.shape_scale(index) else None


def _written_out(blocks: Blocks, moves: Sequence[Move], index: int, rows: torch.Tensor | None = None) -> Part:
    """What operators write for a block, made when it is added."""
    tensor = blocks[index].tensor
    width = tensor.shape[-1] if tensor.ndim else 1

    def written() -> Callable[[torch.Tensor, int], object]:
        scales: list[tuple[Direction, float]] = []  # each direction is written once
        for move in moves:
            known = next((k for k, (direction, _) in enumerate(scales) if direction == move.direction), len(scales))
            before = sum(scale for _, scale in scales[known : known + 1])
            scales[known : known + 1] = [(move.direction, before + move.shape_scale(index))]
        total: torch.Tensor | None = None
        for direction, scale in scales:
            if scale:
                own = _shaped(direction, blocks, index).mul_(scale)
                total = own if total is None else total.add_(own)
        whole = (torch.zeros_like(blocks[index].flat) if total is None else total).view(-1, width)
        moved = whole if rows is None else whole[rows]
        return lambda weights, at: weights.add_(moved[at : at + len(weights)])

    return Part(written, tensor.numel() // width if rows is None else len(rows), width, rows)


def rounds(piece: TensorSlice) -> bool:
    """Whether the weights are of half precision: computed in float32 and rounded once."""
    return computed_in(piece.flat.dtype) != piece.flat.dtype


def add_part(
    whole: TensorSlice,
    pieces: Sequence[TensorSlice],
    part: Part,
    terms: Sequence[NoiseTerm],
    rounding: Key | None = None,
    into: torch.Tensor | None = None,
) -> None:
    """Add dense noise and the part to one block, or to a copy of it; half precision is rounded once.

    Args:
        whole: the block.
        pieces: the block again, or the part's rows one by one.
        terms: dense noise, with the scales of one piece, which are those of every other; none where there is none.
        into: [rows * n] the copy that the pieces are written to, all of it; None: the block itself is moved.
    """

    def rounded(widen: Callable[[], tuple[int, torch.Tensor]]) -> None:
        at, wide = widen()
        if part.rows is None:
            some = [_read_from(wide.view(-1), pieces[0], at * part.width)]
        else:
            some = [_read_from(row, pieces[at + k]) for k, row in enumerate(wide)]
        add_noise(some, _for_each(terms, len(some)), rounding=rounding)

    if whole.master is None and rounds(whole):
        complete(partial(rounded, widen) for widen in part.widened(whole.flat))
        return
    writes: list[Callable[[], object]] = []
    if whole.master is not None:
        writes.append(partial(part.add_to, whole.master))
    if terms or into is not None or whole.master is not None:
        writes.append(partial(add_noise, pieces, _for_each(terms, len(pieces))))
    if whole.master is None:
        writes.append(partial(part.add_to, whole.flat if into is None else into, packed=into is not None))
    complete(writes)


def copy_blocks(pieces: Sequence[TensorSlice], term: NoiseTerm, parts: Mapping[int, Part]) -> None:
    """Perturbed copies of whole blocks, to where their pieces say. ``parts`` of some, by their place among the pieces."""
    alone = [k for k in parts if rounds(pieces[k])]
    dense = [k for k in range(len(pieces)) if k not in alone and (k not in parts or any(term.scales[k]))]
    add_noise([pieces[k] for k in dense], [_only(term, dense)])
    add_noise([pieces[k] for k in range(len(pieces)) if k not in alone and k not in dense])
    for k, part in parts.items():
        if k in alone:
            add_part(pieces[k], [pieces[k]], part, [_only(term, [k])] if any(term.scales[k]) else [], into=pieces[k].into)
        elif (into := pieces[k].into) is not None:
            part.add_to(into)


def _read_from(wide: torch.Tensor, piece: TensorSlice, at: int = 0) -> TensorSlice:
    """A run of a piece that is read from ``wide``, and written rounded to where the piece is written."""
    target = piece.flat if piece.into is None else piece.into
    return TensorSlice(target[at : at + len(wide)], piece.name, piece.offset + at, None, wide)


def _for_each(terms: Sequence[NoiseTerm], count: int) -> list[NoiseTerm]:
    return [replace(term, scales=list(term.scales) * count) for term in terms]


@dataclass(frozen=True)
class Perturbation:
    """The weights are perturbed by ``distance * u``."""

    direction: Direction
    distance: float

    def move(self, count: int, times: float = 1.0) -> Move:
        """The move from the unperturbed weights to there, ``times`` over."""
        return Move(self.direction, (times * self.distance,) * count)


def apply_moves(
    blocks: Blocks,
    moves: Sequence[Move],
    piece: Callable[[int], TensorSlice],
    chosen: Sequence[int],
    at: Perturbation | None = None,
    rounding: Key | None = None,
) -> Sums | None:
    """Make the moves in turn, of the chosen blocks, in one traversal. Their scales are finite.

    Args:
        piece: the memory of a block.
        at: the perturbation that the moves lead to, where the sums for moments are wanted.
        rounding: key of stochastic rounding.
    """
    if not chosen or not moves:
        return None
    sparse = {i for move in moves for i in move.rows}
    whole = [i for i in chosen if i not in sparse]
    parts = parts_of(blocks, moves, whole)
    writes: list[Callable[[], object]] = [
        partial(_move_rows, blocks, piece(i), move, i, rounding) for i in sparse & set(chosen) for move in moves
    ]
    scales = [move.direction.scales(move.amounts) for move in moves]
    gather = None
    if at is not None:
        restoring, centre = at.direction.scales([-at.distance] * len(blocks)), at.direction.centre
        assert centre is not None, "sums are only taken about a centre"
        gather = MomentRequest([restoring[i] for i in whole], [centre[i] for i in whole])
    else:  # a block that does not move is not read
        whole = [i for i in whole if any(own[i] for own in scales)]
    if parts:  # half precision is rounded once for noise and part: such a block is moved by itself
        apart = [i for i in parts if rounds(piece(i))]
        for i in apart:
            own = [move.term([i]) for move in moves] if i in whole else []
            writes.append(partial(add_part, piece(i), [piece(i)], parts.pop(i), own, rounding))
        whole = [i for i in whole if i not in apart]
    pieces = [
        (i, one) for i in whole for one in (shard_slices(blocks[i].name, blocks[i].tensor) if blocks[i].sharded else [piece(i)])
    ]
    terms = [
        NoiseTerm(move.direction.key, [(own[i],) for i, _ in pieces], move.direction.distribution)
        for move, own in zip(moves, scales, strict=True)
    ]
    sums: list[Sums | None] = []
    writes.append(lambda: sums.append(add_noise([one for _, one in pieces], terms, gather, rounding)))
    complete([*writes, *(partial(part.add_to, piece(i).flat) for i, part in parts.items())])
    return sums[0]


def _move_rows(blocks: Blocks, whole: TensorSlice, move: Move, index: int, rounding: Key | None) -> None:
    """Move a block of which a move takes only some rows."""
    rows = move.rows.get(index)
    width = blocks[index].numel // blocks[index].tensor.shape[0]
    pieces = [whole] if rows is None else [rows_piece(whole, row, 1, width) for row in rows.tolist()]
    part = rows_part(blocks, index, move, rows)
    if part is not None:
        add_part(whole, pieces, part, [move.term([index])] if move.dense(index) else [], rounding)
    elif move.dense(index):
        add_noise(pieces, [move.term([index] * len(pieces))], rounding=rounding)


def rows_piece(whole: TensorSlice, row: int, count: int, width: int, into: torch.Tensor | None = None) -> TensorSlice:
    """``count`` neighbouring rows, from ``row`` on, of a block of rows of ``width``."""
    span = slice(row * width, (row + count) * width)
    master = None if whole.master is None else whole.master[span]
    return TensorSlice(whole.flat[span], whole.name, whole.offset + row * width, into, master)
