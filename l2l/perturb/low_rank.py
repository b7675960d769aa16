"""Walking along a basis: what several moves add to a block together is one product of two thin matrices.

The noise R is made by the same traversal as dense noise, of the same exact products; W += (sum_k c_k R_k) V^T is then one
matrix product per block. So a weight that is walked in place is rounded once for the dense noise and once for this.

R and its sums are the same bits whatever the number of threads, the backend or the device, as dense noise is. The product
with V^T is what the machine's BLAS makes of it: the same bits in every run on one machine with one number of threads; the
last bit may differ elsewhere. Out, across and back are the same product times 1, -2 and 1, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks
from l2l.noise import TensorSlice, add_noise
from l2l.noise.pieces import computed_in
from l2l.perturb.basis import Basis, basis_name, full_precision
from l2l.perturb.direction import Move
from l2l.perturb.part import RUN, Part


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
