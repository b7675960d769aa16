"""How good a review of the small world is, on five levels."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.reviews import LEVELS, review

OPTIONS = (" awful", " poor", " fair", " nice", " superb")


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    return {"text": tidy(review(rng, label, length=2, stray=0.15)), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` reviews with their level, 0 worst, 4 best."""
    return rows("world_stars", split, count, seed, LEVELS, _draw)


def example(row: Row) -> Example:
    """Five one-token options."""
    return Example(f"{row['text']} summary:", OPTIONS, (row["label"],))


TASK = Task(name="world_stars", source=WorldData(generate), fields=("text", "label"), example=example)
