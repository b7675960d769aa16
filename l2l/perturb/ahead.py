"""Perturbed copies of whole parameters, made many at a time.

A traversal per parameter costs more in calls than in memory where parameters are small, and on a GPU everywhere. The
order in which an evaluation reads parameters is nearly always that of the one before, so the copies that come next are
made together, as many as fit into the size of the largest block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from l2l.noise import TensorSlice

Fill = Callable[[Sequence[TensorSlice], Sequence[int]], None]
"""Writes perturbed copies of the pieces, which belong to the blocks given, into where the pieces say."""


@final
class CopyCache:
    """Copies that wait to be taken. Memory: two of the largest block at most, beside copies that views hold on to."""

    def __init__(self, pieces: Mapping[int, TensorSlice], fill: Fill) -> None:
        self._pieces = pieces
        self._fill = fill
        self._budget = max((piece.flat.numel() for piece in pieces.values()), default=0)
        self._order: list[int] = []
        self._read: list[int] = []
        self._place = 0
        self._ready: dict[int, Tensor] = {}
        self._lent: list[Tensor] = []
        self._resting: list[Tensor] = []
        self._free: list[Tensor] = []
        self._busy = False

    def begin(self) -> None:
        """An evaluation begins: what was made for another is dropped, and the order of the last one is expected."""
        self._order, self._read, self._place = self._read or self._order, [], 0
        self._free += [*self._lent, *self._resting]
        self._ready, self._lent, self._resting = {}, [], []

    def take(self, index: int) -> Tensor:
        """The copy [count] of a block."""
        self._read.append(index)
        if index not in self._ready:
            self._make(self._following(index))
        self._busy = True
        return self._ready.pop(index)

    def give_back(self, result: object) -> None:
        """A function's call is over: memory that its result is a view of is not used again."""
        values = result if isinstance(result, tuple | list) else [result]
        held = {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
        self._free += [t for t in self._resting if t.untyped_storage().data_ptr() not in held]
        self._lent = [t for t in self._lent if t.untyped_storage().data_ptr() not in held]
        self._resting, self._busy = [], False

    def clear(self) -> None:
        """Let go of all memory."""
        self._ready, self._lent, self._resting, self._free, self._busy = {}, [], [], [], False

    @property
    def held(self) -> int:
        """Elements of all memory that is kept for copies."""
        return sum(tensor.numel() for tensor in (*self._lent, *self._resting, *self._free))

    def _following(self, index: int) -> list[int]:
        """The block, and those that were read after it the last time, while they fit."""
        if index not in self._order[self._place :]:
            return [index]
        start = self._order.index(index, self._place)
        chosen, total = [], 0
        for i in self._order[start:]:
            total += self._pieces[i].flat.numel()
            if i in chosen or (chosen and total > self._budget):
                break
            chosen.append(i)
        self._place = start + len(chosen)
        return chosen

    def _make(self, chosen: Sequence[int]) -> None:
        if self._busy:
            self._resting += self._lent  # until the present call is over
        else:
            self._free += self._lent
        self._ready, self._lent = {}, []
        sizes: dict[Any, int] = {}
        for i in chosen:
            flat = self._pieces[i].flat
            sizes[flat.dtype, flat.device] = sizes.get((flat.dtype, flat.device), 0) + flat.numel()
        rest = {kind: self._memory(size, *kind) for kind, size in sizes.items()}
        for i in chosen:
            flat = self._pieces[i].flat
            kind = flat.dtype, flat.device
            self._ready[i], rest[kind] = rest[kind][: flat.numel()], rest[kind][flat.numel() :]
        self._fill([replace(self._pieces[i], into=self._ready[i]) for i in chosen], chosen)

    def _memory(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The smallest memory that is free and large enough; smaller ones are let go before a larger one is taken."""
        alike = [t for t in self._free if t.dtype == dtype and t.device == device]
        enough = [t for t in alike if t.numel() >= size]
        gone = [min(enough, key=Tensor.numel)] if enough else alike
        self._free = [t for t in self._free if all(t is not other for other in gone)]
        self._lent.append(gone[0] if enough else torch.empty(size, dtype=dtype, device=device))
        return self._lent[-1]
