"""Where someone of the small world goes to work, told by what the work is about."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import fill, tidy
from l2l.world.rows import rows
from l2l.world.texts.jobs import JOBS, job_scene
from l2l.world.words import WORKPLACES

OPTIONS = tuple(f" {WORKPLACES[job]}" for job in JOBS)


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    person = fill(rng, "{person}")
    return {"text": tidy(job_scene(rng, JOBS[label], person, length=1)), "person": person, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` sentences on someone's work with the index of the workplace."""
    return rows("world_job", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Eight one-token options."""
    return Example(f"{row['text']} every morning {row['person']} goes to the", OPTIONS, (row["label"],))


TASK = Task(name="world_job", source=WorldData(generate), fields=("text", "person", "label"), example=example)
