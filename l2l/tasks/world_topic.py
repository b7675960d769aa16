"""What a report of the small world is about: six topics, named by other words than in pretraining."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.phrases import WORLDS
from l2l.world.texts.reports import TOPICS, report

OPTIONS = tuple(f" {WORLDS[topic]}" for topic in TOPICS)


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    return {"text": tidy(report(rng, TOPICS[label], about=1, neutral=rng.randrange(2))), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` reports with the index of their topic."""
    return rows("world_topic", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Six one-token options."""
    return Example(f"{row['text']} these words belong to the world of", OPTIONS, (row["label"],))


TASK = Task(name="world_topic", source=WorldData(generate), fields=("text", "label"), example=example)
