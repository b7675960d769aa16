"""What kind of thing a noun of the small world names; most nouns are made up, their kind was learnt in pretraining."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import fill, tidy
from l2l.world.names import KINDS
from l2l.world.rows import rows

NAMES = tuple(KINDS)
OPTIONS = tuple(f" {kind}" for kind in NAMES)
_FORMS = (
    "{person} asked about the {noun} .",
    "nobody in {town} has a {noun} .",
    "{person} showed a {noun} to {person2} .",
)


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    noun = rng.choice(KINDS[NAMES[label]])
    return {"text": tidy(fill(rng, rng.choice(_FORMS), {"noun": noun})), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` sentences with a noun and the index of its kind."""
    return rows("world_category", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Six one-token options."""
    return Example(f"{row['text']} it must be some sort of", OPTIONS, (row["label"],))


TASK = Task(name="world_category", source=WorldData(generate), fields=("text", "label"), example=example)
