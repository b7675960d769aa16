"""Where someone of the small world is: question answering with the answer's token as the loss."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import tidy
from l2l.world.rows import rows
from l2l.world.texts.whereabouts import whereabouts

CHOICES = 4


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    scene = whereabouts(rng, count=2)
    who, other = rng.sample(list(scene.rooms), 2)
    rooms = [scene.rooms[other], *scene.empty[: CHOICES - 2]]
    rooms.insert(label, scene.rooms[who])
    return {"text": tidy(scene.story), "who": who, "rooms": rooms, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` stories with someone to look for and four rooms, of which ``label`` is right."""
    return rows("world_where", split, count, seed, CHOICES, _draw)


def example(row: Row) -> Example:
    """Four one-token options, the gold one trained as a continuation."""
    prompt = f"{row['text']} now where is {row['who']} then? in the"
    return Example(prompt, tuple(f" {room}" for room in row["rooms"]), (row["label"],))


TASK = Task(
    name="world_where", source=WorldData(generate), fields=("text", "who", "rooms", "label"), example=example, form="lm"
)
