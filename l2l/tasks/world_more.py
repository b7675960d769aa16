"""Who of two people of the small world has more of something."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.counting import count_scene, opening


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    scene = count_scene(rng)
    names = [scene["more"], scene["less"]] if label == 0 else [scene["less"], scene["more"]]
    return {"text": tidy(opening(rng, scene)), "names": names, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` pairs of counts and two names, of which ``label`` has more."""
    return rows("world_more", split, count, seed, 2, _draw)


def example(row: Row) -> Example:
    """Two one-token options, other names in every row."""
    return Example(f"{row['text']} and who has more then?", tuple(f" {name}" for name in row["names"]), (row["label"],))


TASK = Task(name="world_more", source=WorldData(generate), fields=("text", "names", "label"), example=example)
