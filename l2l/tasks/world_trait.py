"""What kind of thing has two traits: feathers and a beak belong to a bird."""

from __future__ import annotations

import random
from typing import Any

from l2l.tasks.base import Example, Row, Split, Task, WorldData
from l2l.world.grammar import fill, tidy
from l2l.world.rows import rows
from l2l.world.texts.kinds import KINDS
from l2l.world.words import KIND_TRAITS

OPTIONS = tuple(f" {kind}" for kind in KINDS)
_FORMS = ("{person} saw it in the {room} .", "{person} saw it in {town} .", "{person} saw it on {day} .")


def _draw(rng: random.Random, label: int) -> dict[str, Any]:
    one, other = rng.sample(KIND_TRAITS[KINDS[label]], 2)
    return {"text": tidy(f"{fill(rng, rng.choice(_FORMS))} it has {one} and {other} ."), "label": label}


def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` descriptions by two traits with the index of the kind."""
    return rows("world_trait", split, count, seed, len(OPTIONS), _draw)


def example(row: Row) -> Example:
    """Six one-token options."""
    return Example(f"{row['text']} it must be some sort of", OPTIONS, (row["label"],))


TASK = Task(name="world_trait", source=WorldData(generate), fields=("text", "label"), example=example)
