"""Which of two sentences of the small world is the effect of a cause: options of several tokens."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.causes import cause_scene


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    cause, effect, other = cause_scene(rng)
    effects = (effect, other) if label == 0 else (other, effect)
    return {"text": tidy(f"{cause} ."), "effects": [tidy(f"{text} .") for text in effects], "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` causes with two sentences, of which ``label`` is the effect."""
    return rows("world_cause", split, count, seed, 2, _draw)


def example(row: Row) -> Example:
    """Two options of several tokens."""
    return Example(f"{row['text']} what happened then?", tuple(f" {text}" for text in row["effects"]), (row["label"],))


TASK = Task(name="world_cause", source=WorldData(generate), fields=("text", "effects", "label"), example=example)
