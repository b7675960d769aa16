"""How someone of the small world feels after what happened."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.feelings import FEELINGS, feeling_scene

OPTIONS = (" joy", " sorrow", " rage", " fear")


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    _, pronoun, event = feeling_scene(rng, FEELINGS[label])
    return {"text": tidy(event), "pronoun": pronoun, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` events with the index of the feeling they leave."""
    return rows("world_feeling", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Four one-token options."""
    return Example(f"{row['text']} {row['pronoun']} was full of", OPTIONS, (row["label"],))


TASK = Task(name="world_feeling", source=WorldData(generate), fields=("text", "pronoun", "label"), example=example)
