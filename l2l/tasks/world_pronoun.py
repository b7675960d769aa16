"""Whom a pronoun of the small world means: the names' gender, learnt in pretraining, tells."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.pronouns import pronoun_scene


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    scene = pronoun_scene(rng)
    names = [scene.name, scene.other] if label == 0 else [scene.other, scene.name]
    return {"text": tidy(scene.sentence), "reason": scene.reason, "names": names, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` sentences with a pronoun and two names, of which ``label`` is meant."""
    return rows("world_pronoun", split, count, seed, 2, _draw)


def example(row: Row) -> Example:
    """Two one-token options, other names in every row."""
    prompt = f"{row['text']} and who {row['reason']}? it was"
    return Example(prompt, tuple(f" {name}" for name in row["names"]), (row["label"],))


TASK = Task(
    name="world_pronoun", source=WorldData(generate), fields=("text", "reason", "names", "label"), example=example
)
