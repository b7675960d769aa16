"""What sort of answer a question asks for."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.questions import SORTS, question

OPTIONS = tuple(f" {sort}" for sort in SORTS)


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    return {"text": tidy(question(rng, SORTS[label])), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` questions with the index of the sort of their answer."""
    return rows("world_question", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Five one-token options."""
    return Example(f"{row['text']} the answer is", OPTIONS, (row["label"],))


TASK = Task(name="world_question", source=WorldData(generate), fields=("text", "label"), example=example)
