"""Which weather goes with what was seen: one kind of weather stands for each season."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import fill, tidy
from l2l.world.rows import rows
from l2l.world.texts.seasons import SEASONS, season_scene

OPTIONS = (" ice", " rain", " sun", " wind")


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    return {"text": tidy(season_scene(rng, SEASONS[label], length=1)), "person": fill(rng, "{person}"), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` sentences with signs of a season, someone who thinks of the weather, and the season's index."""
    return rows("world_season", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Four one-token options."""
    return Example(f"{row['text']} {row['person']} thought of", OPTIONS, (row["label"],))


TASK = Task(name="world_season", source=WorldData(generate), fields=("text", "person", "label"), example=example)
