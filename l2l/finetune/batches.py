"""Which examples a step sees: a pure function of (rows, batch size, seed, step), so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import final

import numpy as np
import torch

from l2l.models.buckets import Grouping
from l2l.tasks.encode import Batch, Encoded, Form, collate

_FURTHER = 1
"""Word that sets the stream of further batches apart from the epochs' permutations."""


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, epoch)).permutation(rows).tolist())


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of a step's batch: epochs without replacement, each in an order of its own, batches crossing their ends."""
    wanted = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(rows, seed, i // rows)[i % rows] for i in wanted]


def further_indices(rows: int, batch_size: int, seed: int, step: int, number: int) -> list[int]:
    """Indices of the ``number``-th further batch of a step, for methods that search on other batches than the step's."""
    generator = np.random.default_rng((seed, step, number, _FURTHER))
    return generator.choice(rows, size=batch_size, replace=rows < batch_size).tolist()


@final
@dataclass(frozen=True)
class Batcher:
    """Batches of encoded examples by step."""

    examples: Sequence[Encoded]
    form: Form
    pad_id: int
    batch_size: int
    seed: int
    device: torch.device | str = "cpu"
    grouping: Grouping = field(default_factory=Grouping)
    """How rows are laid out and split for feeding; which examples a step sees does not depend on it."""

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        return self._collate(batch_indices(len(self.examples), self.batch_size, self.seed, step))

    def further(self, step: int, number: int) -> Batch:
        """A further batch of the same step."""
        return self._collate(further_indices(len(self.examples), self.batch_size, self.seed, step, number))

    def _collate(self, indices: list[int]) -> Batch:
        batch = collate([self.examples[i] for i in indices], self.form, self.pad_id, grouping=self.grouping)
        return replace(batch, parts=self.grouping.split(batch)).to(self.device)
