"""Walking along a shape: what several moves add to a block together is written out, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import TensorSlice, NoiseTerm, add_noise
from l2l.noise.pieces import computed_in
from l2l.perturb.basis import full_precision, low_rank_noise
from l2l.perturb.direction import Direction, Move
from l2l.perturb.part import RUN, Part


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
        add_noise([TensorSlice(out.view(-1), block.name)], [NoiseTerm(direction.key, [(scale,)], direction.distribution)])
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
