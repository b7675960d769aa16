"""Whether a claim follows from a premise, contradicts it, or is left open."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.statements import ANSWERS, statement

OPTIONS = tuple(f" {answer}" for answer in ANSWERS)


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    premise, claim = statement(rng, label)
    return {"text": tidy(premise), "claim": tidy(claim), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` premises with a claim; label 0 follows, 1 contradicts, 2 is open."""
    return rows("world_entailment", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Three one-token options."""
    return Example(f"{row['text']} does it follow that {row['claim']}? this is", OPTIONS, (row["label"],))


TASK = Task(name="world_entailment", source=WorldData(generate), fields=("text", "claim", "label"), example=example)
