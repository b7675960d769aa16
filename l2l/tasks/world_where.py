"""Where someone of the small world was seen: question answering, the answer's token is the loss."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import fill, people, tidy
from l2l.world.rows import rows
from l2l.world.words import ROOMS

CHOICES = 4
_PLACED = (
    "{who} found the {thing} in the {place} .",
    "{who} was alone in the {place} .",
    "{who} heard a scream from the {place} .",
)
_STRAY = ("{other} bought {items} .", "{other} has a {color} {thing} .", "{other} lives in {town} .")


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    (who, other), places = people(rng, 2), rng.sample(ROOMS, CHOICES)
    scene = {"who": who, "other": other, "place": places[label]}
    story = [fill(rng, rng.choice(forms), scene) for forms in (_PLACED, _STRAY)]
    rng.shuffle(story)
    return {"text": tidy(" ".join(story)), "who": who, "places": places, "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` stories with one of their people and four places, of which ``label`` is right."""
    return rows("world_where", split, count, seed, CHOICES, _draw)


def example(row: Row) -> Example:
    """Four one-token options, the gold one trained as a continuation."""
    prompt = f"{row['text']} we saw {row['who']} in the"
    return Example(prompt, tuple(f" {place}" for place in row["places"]), (row["label"],))


TASK = Task(
    name="world_where",
    source=WorldData(generate),
    fields=("text", "who", "places", "label"),
    example=example,
    form="lm",
)
