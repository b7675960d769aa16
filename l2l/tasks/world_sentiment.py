"""Whether a review of the small world praises or blames."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.reviews import review

OPTIONS = (" awful", " nice")
_LEVELS = ((0, 1), (3, 4))


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    return {"text": tidy(review(rng, rng.choice(_LEVELS[label]), length=2, stray=0.2)), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` reviews; label 0 blames, 1 praises."""
    return rows("world_sentiment", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Two one-token options."""
    return Example(f"{row['text']} this is", OPTIONS, (row["label"],))


TASK = Task(name="world_sentiment", source=WorldData(generate), fields=("text", "label"), example=example)
