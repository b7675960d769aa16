"""The in-place engine: float32 weights are perturbed in memory, and brought back by the same products.

Work is done as late as possible, in one traversal: back from the present perturbation, the pending moves, and out to the
next perturbation. So a step costs three traversals when it must end at the unperturbed weights, and two when the next
step follows at once. Where nothing reads the perturbed weights, as in a replay, traversals wait until the weights are read,
and those of dense noise alone are then made in one, with the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import final

import torch

from l2l.interrupts import complete
from l2l.noise import Sums, TensorSlice, prepare_memory, round_scale
from l2l.params.blocks import Blocks
from l2l.params.direction import Direction, Move
from l2l.params.engine import Moments, Perturbation, apply_moves, measure_blocks, moments_of, sums_at
from l2l.params.functional import PerturbEngine


def merges(direction: Direction) -> bool:
    """Whether moves along it have the same bits in any traversal: those along a basis or by an operator, and the bits of one
    hash, are summed within a traversal and rounded together."""
    return direction.only_noise and direction.distribution != "packed_rademacher"


def _moving(moves: Sequence[Move]) -> tuple[bool, ...]:
    """Which blocks a traversal reads."""
    return tuple(map(any, zip(*(move.direction.scales(move.amounts) for move in moves), strict=True)))


MOST = 4096
"""Moves that wait at most: their scales and key words, 24 bytes a step, then lie in the cache."""


@final
class InPlaceEngine(PerturbEngine):
    """Extra memory: none; while moving along a basis [n, r], r numbers for each row of its block.

    Sparse blocks are not perturbed in place: their rows are looked up in transient copies. Of sharded blocks each process moves
    what it holds, and the sums for moments are taken by a traversal of their own.
    """

    def __init__(self, blocks: Blocks, sparse: Sequence[int] = ()) -> None:
        super().__init__(blocks, {i: TensorSlice(blocks[i].flat, blocks[i].name) for i in sparse}, sparse)
        self._dense = [i for i in range(len(blocks)) if i not in sparse]
        self._sparse, self._sharded = list(sparse), blocks.sharded is not None
        self._at: Perturbation | None = None
        self._sums: Sums | None = None
        self._prepared = False
        self._seen: list[tuple[int, int]] = []  # as the last perturbation left them
        self._waiting: list[list[Move]] | None = None
        """Traversals that are still to be made; None: each is made at once."""
        self._moves = 0

    def written(self) -> str | None:
        if self._at is None or (now := self._versions()) == self._seen:
            return None
        pairs = zip(self._blocks, self._seen, now, strict=True)
        return next(block.name for block, before, after in pairs if before != after)

    def _piece(self, index: int) -> TensorSlice:
        return TensorSlice(self._blocks[index].flat, self._blocks[index].name)

    def perturb(self, at: Perturbation | None, moves: Sequence[Move]) -> None:
        if at == self._at and not moves:
            return
        if not self._prepared:
            prepare_memory([block.flat for block in self._blocks])
            self._prepared = True
        count = len(self._blocks)
        across = at is not None and not moves and self._at == Perturbation(at.direction, -at.distance)
        if across and at is not None:
            # From +epsilon to -epsilon by exactly twice the rounded scale: one addition and one rounding, not two.
            steps = [at.move(count, 2.0)]
        else:
            back = [] if self._at is None else [self._at.move(count, -1.0)]
            steps = [*back, *moves, *([] if at is None else [at.move(count)])]
        # The sums are those of the dense noise: with a basis or an operator they do not give the moments.
        summed = across and at is not None and at.direction.centre is not None and at.direction.only_noise
        with torch.no_grad():
            if self._waiting is None or summed or not all(merges(move.direction) for move in steps):
                self.settle()
                wanted = at if summed and not self._sharded else None
                writes = [lambda: apply_moves(self._blocks, steps, self._piece, self._dense, wanted)]
                if self._sparse:  # a perturbation does not touch these in memory
                    writes.append(lambda: apply_moves(self._blocks, moves, self._piece, self._sparse))
                self._sums = complete(writes)[0]
                if summed and at is not None and self._sharded:
                    self._sums = sums_at(self._blocks, at)
            else:  # nothing is sparse
                self._sums = None
                self._waiting.append(steps)
                self._moves += len(steps)
                if self._moves > MOST:
                    self.settle()
        self._at = at
        if at is not None:
            self._seen = self._versions()
        self._substitution.perturb(at)

    def wait(self) -> None:
        if not self._sparse:
            self._waiting = []

    def settle(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting, self._moves = self._waiting, [], 0
        # a block that does not move in a traversal is not touched by it
        merged = [[move for moves in run for move in moves] for _, run in groupby(waiting, _moving)]
        with torch.no_grad():
            complete(partial(apply_moves, self._blocks, moves, self._piece, self._dense) for moves in merged)

    def revert(self, moves: Sequence[Move]) -> None:
        self.perturb(None, [replace(move, amounts=tuple(-amount for amount in move.amounts)) for move in reversed(moves)])

    def moments(self, direction: Direction, moves: Sequence[Move]) -> Moments | None:
        centre = direction.centre or (0.0,) * len(self._blocks)
        if self._at is None and not moves:
            self.settle()
            return measure_blocks(self._blocks, centre)
        known = self._sums is not None and self._at is not None and self._at.direction == direction
        if not known or self._sparse or any(move.direction != direction for move in moves):
            return None
        assert self._sums is not None, "known"
        scale = [0.0] * len(self._blocks)
        for move in moves:
            terms = zip(self._blocks, direction.scales(move.amounts), strict=True)
            scale = [s + round_scale(t, block.tensor.dtype) for s, (block, t) in zip(scale, terms, strict=True)]
        return moments_of(self._sums, [block.numel for block in self._blocks], centre, scale)

    def check_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if state:
            raise ValueError("this state has float32 master weights; these weights are perturbed in place and need none")
