"""Which of four words is the opposite of a word."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import fill, tidy
from l2l.world.rows import rows
from l2l.world.texts.opposites import PAIRS

CHOICES = 4
_FORMS = ("{person} thought of it on {day} .", "{person} spoke with {person2} .", "the {thing} is in {town} .")


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    one, other = rng.sample(rng.choice(PAIRS), 2)
    choices = rng.sample([word for pair in PAIRS for word in pair if word not in (one, other)], CHOICES - 1)
    choices.insert(label, other)
    return {"text": tidy(f"{fill(rng, rng.choice(_FORMS))} not {one} but"), "choices": choices, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` beginnings that ask for the opposite of their last word but one, and four words."""
    return rows("world_opposite", split, count, seed, CHOICES, _draw)


def example(row: Row) -> Example:
    """Four one-token options, other words in every row."""
    return Example(row["text"], tuple(f" {word}" for word in row["choices"]), (row["label"],))


TASK = Task(name="world_opposite", source=WorldData(generate), fields=("text", "choices", "label"), example=example)
