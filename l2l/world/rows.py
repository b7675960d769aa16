"""From a scene of the world to the rows of a task: pure, balanced over labels, train and validation disjoint."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any, Literal

_VALIDATION_SHARE = 4
"""One text in this many belongs to validation."""

Draw = Callable[[random.Random, int], dict[str, Any]]
"""Draws one row whose correct label is the given index; the row's ``text`` decides which split it belongs to."""


def rows(
    task: str, split: Literal["train", "validation"], count: int, seed: int, labels: int, draw: Draw
) -> list[dict[str, Any]]:
    """``count`` rows of ``split``; every ``labels`` of them in a row hold each label once. Same call, same rows.

    A row belongs to a split by a checksum of its ``text``, so no text is in both splits, whatever the seed.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; a world task has 'train' and 'validation'")
    rng = random.Random(f"{task} {split} {seed}")
    found: list[dict[str, Any]] = []
    order: list[int] = []
    while len(found) < count:
        order = order or rng.sample(range(labels), labels)
        found.append(_of_split(rng, split, order.pop(), draw))
    return found


def _of_split(rng: random.Random, split: str, label: int, draw: Draw) -> dict[str, Any]:
    while True:
        row = draw(rng, label)
        if ("validation" if zlib.crc32(row["text"].encode()) % _VALIDATION_SHARE == 0 else "train") == split:
            return row
