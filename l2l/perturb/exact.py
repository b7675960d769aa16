"""Walking exactly: the stored weights are never perturbed, and an update is not lost in their precision.

Evaluations read transient copies (see :mod:`l2l.perturb.transient`). A step's moves are written once, at its end: into
float32 masters whose rounded copies the model holds, or into bfloat16 weights with stochastic rounding, which is right
on average. Tensors of one dimension (norms, biases) always have a master: rounding would eat their updates whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, final

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import Key, TensorSlice
from l2l.noise.reference import add_noise as eager_traverse
from l2l.perturb.adding import parts_of
from l2l.perturb.direction import Direction, Move
from l2l.perturb.moments import Moments, measure
from l2l.perturb.safety import defer_interrupt
from l2l.perturb.transient import Substitution
from l2l.perturb.walker import Perturbation, PerturbEngine, apply_moves

HALF = (torch.bfloat16, torch.float16)
ROUNDING, SHRINKING = -1, -2
"""Draws of the rounding noise: no direction's draw is negative."""


@final
class FunctionalEngine(PerturbEngine):
    """Extra memory: two of the largest block while evaluating; with ``master``, four bytes per coordinate of a block.

    Along a basis [n, r], r numbers for each row of the blocks that are copied or moved together, and a few MiB.

    Args:
        update: ``master`` or ``stochastic``, for half-precision blocks of two dimensions or more.
        sparse: blocks of which only the rows looked up move.

    Raises:
        ValueError: stochastic rounding is asked for a float16 matrix.
    """

    def __init__(self, blocks: Blocks, update: Literal["master", "stochastic"], sparse: Sequence[int] = ()) -> None:
        self._blocks = blocks
        half = [i for i, block in enumerate(blocks) if block.tensor.dtype in HALF]
        narrow = [i for i in half if blocks[i].tensor.ndim < 2]
        refused = [blocks[i].name for i in half if i not in narrow and blocks[i].tensor.dtype == torch.float16]
        if update == "stochastic" and refused:
            raise ValueError(
                f"update='stochastic' rounds to bfloat16, but block {refused[0]!r} is float16: use update='master'"
            )
        with_master = half if update == "master" else narrow
        self._masters = {i: blocks[i].flat.float() for i in with_master}
        self._stochastic = [i for i in half if i not in self._masters]
        pieces = {i: TensorSlice(self._masters[i] if i in narrow else b.flat, b.name) for i, b in enumerate(blocks)}
        self._substitution = Substitution(blocks, pieces, frozenset(sparse))
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._last_key = Key(0)
        self._seen = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [(block.tensor._version, block.tensor.data_ptr()) for block in self._blocks]

    def begin(self) -> None:
        now = self._versions()
        for i, (before, after) in enumerate(zip(self._seen, now, strict=True)):
            if before != after and i in self._masters:
                self._masters[i].copy_(self._blocks[i].flat)
            if before[1] != after[1] and self._blocks[i].tensor.dtype == self._substitution.pieces[i].flat.dtype:
                self._substitution.pieces[i] = TensorSlice(self._blocks[i].flat, self._blocks[i].name)
        self._seen = now

    def _piece(self, index: int) -> TensorSlice:
        block = self._blocks[index]
        return TensorSlice(block.flat, block.name, 0, None, self._masters.get(index))

    def stand(self, look: Perturbation | None, moves: Sequence[Move]) -> None:
        self.commit(moves, True)
        self._substitution.stand(look)

    def commit(self, moves: Sequence[Move], undoable: bool) -> None:
        self._substitution.stand(None)
        if moves:
            self._last_key = moves[0].direction.key
        moving = [move for move in moves if not move.nowhere]
        if not moving:
            return
        everything = range(len(self._blocks))
        with torch.no_grad(), defer_interrupt():
            if undoable:
                self._keep(everything)
            nearest = [i for i in everything if i not in self._stochastic]
            apply_moves(self._blocks, moving, self._piece, nearest)
            rounding = self._last_key.with_draw(ROUNDING)
            apply_moves(self._blocks, moving, self._piece, self._stochastic, rounding=rounding)
            self._seen = self._versions()

    def _keep(self, indices: Sequence[int]) -> None:
        for i in indices:
            if i not in self._kept:
                master = self._masters.get(i)
                self._kept[i] = (self._blocks[i].flat.clone(), None if master is None else master.clone())

    def revert(self, moves: Sequence[Move]) -> None:
        with torch.no_grad(), defer_interrupt():
            for i, (weights, master) in self._kept.items():
                self._blocks[i].flat.copy_(weights)
                if master is not None:
                    self._masters[i].copy_(master)
            self._kept = {}
            self._seen = self._versions()

    def finish(self) -> None:
        self._kept = {}

    def evaluating(self) -> AbstractContextManager[Any]:
        return self._substitution.active()

    def touched(self) -> dict[int, Tensor]:
        return self._substitution.take_touched()

    def moments(self, direction: Direction, moves: Sequence[Move]) -> Moments | None:
        count = len(self._blocks)
        pieces = [TensorSlice(self._masters.get(i, block.flat), block.name) for i, block in enumerate(self._blocks)]
        whole = [
            Move(move.direction, tuple(0.0 if i in move.rows else a for i, a in enumerate(move.amounts)))
            for move in moves
        ]
        parts = parts_of(self._blocks, whole, range(count))
        return measure(pieces, direction.centre or (0.0,) * count, [move.term(range(count)) for move in whole], parts)

    def value(self, index: int) -> Tensor:
        block = self._blocks[index]
        return self._masters[index].view(block.tensor.shape) if index in self._masters else block.tensor.detach()

    def rewrite(self, index: int, change: Callable[[Tensor], Any]) -> None:
        block, kept = self._blocks[index], self.value(index)
        if index in self._stochastic:
            wide = kept.float()
            change(wide)
            rounding = self._last_key.with_draw(SHRINKING)
            eager_traverse([TensorSlice(block.flat, block.name, 0, None, wide.view(-1))], rounding=rounding)
        else:
            change(kept)
            if index in self._masters:
                block.flat.copy_(self._masters[index])
        self._seen = self._versions()

    def extra_state(self) -> dict[str, Tensor]:
        return {self._blocks[i].name: master for i, master in self._masters.items()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        names = {self._blocks[i].name for i in self._masters}
        if names != set(state):
            raise ValueError(
                f"this state has {len(state)} float32 master weights where {len(names)} are needed: it was saved with "
                "another choice of walk or update"
            )
        with torch.no_grad():
            for i, master in self._masters.items():
                master.copy_(state[self._blocks[i].name])
                self._blocks[i].flat.copy_(master)
        self._seen = self._versions()


def check_perturb_mode(blocks: Blocks, perturb: str, update: str) -> bool:
    """Whether a block is of half precision.

    Raises:
        ValueError: in-place walking is asked for such a block, or a value is none that there is.
    """
    half = next((block for block in blocks if block.tensor.dtype in HALF), None)
    if perturb == "in_place" and half is not None:
        raise ValueError(
            f"walk='in_place', but block {half.name!r} is {half.tensor.dtype}: walking half-precision weights in "
            "place makes them drift; use walk='exact' or load the model with dtype float32"
        )
    if perturb not in ("auto", "in_place", "exact"):
        raise ValueError(f"walk={perturb!r} must be 'auto', 'in_place' or 'exact'")
    if update not in ("master", "stochastic"):
        raise ValueError(f"update={update!r} must be 'master' or 'stochastic'")
    return half is not None
