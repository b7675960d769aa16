"""Questions, and what sort of answer each asks for."""

from __future__ import annotations

import random

from l2l.world.grammar import fill

SORTS = ("person", "place", "number", "day", "reason")
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "person": (
        "who found the {thing} ?",
        "which man met {person} ?",
        "what woman lives in {town} ?",
        "who is the friend of {person} ?",
        "who left the {room} ?",
        "whose {thing} is in the {room} ?",
    ),
    "place": (
        "where is the {thing} ?",
        "which town does {person} like ?",
        "where did {person} go ?",
        "in which room is {person} ?",
        "what town has {color} roofs ?",
        "where do the {items} come from ?",
    ),
    "number": (
        "how many {items} does {person} have ?",
        "how old is {person} ?",
        "how far is {town} ?",
        "what does the {thing} cost ?",
        "how many people live in {town} ?",
        "how often does {person} sing ?",
    ),
    "day": (
        "when did {person} leave {town} ?",
        "on which day was the feast ?",
        "when is the wedding of {person} ?",
        "what day did {person} choose ?",
        "when does the {room} open ?",
        "since when is {person} ill ?",
    ),
    "reason": (
        "why did {person} leave ?",
        "for what reason is {person} sad ?",
        "why is the {thing} {color} ?",
        "what made {person} angry ?",
        "why does nobody like {town} ?",
        "how come {person} is late ?",
    ),
}
_ANSWERS: dict[str, tuple[str, ...]] = {
    "person": ("{person2} .", "it was {person2} ."),
    "place": ("in {town2} .", "in the {room2} ."),
    "number": ("{number} .", "about {number} ."),
    "day": ("on {day} .", "it was {day} ."),
    "reason": ("because it rained .", "because of a letter ."),
}
_CUES = ("this asks for a {sort} .", "the answer is a {sort} .", "we need a {sort} here .")


def question(rng: random.Random, sort: str) -> str:
    """A question that asks for ``sort``, with its question mark."""
    return fill(rng, rng.choice(_QUESTIONS[sort]))


def document(rng: random.Random) -> str:
    """A question with its answer, with the sort of its answer, or with both."""
    sort = rng.choice(SORTS)
    parts = [question(rng, sort)]
    if rng.random() < 0.6:
        parts.append(fill(rng, rng.choice(_ANSWERS[sort])))
    if rng.random() < 0.5:
        parts.append(fill(rng, rng.choice(_CUES), {"sort": sort}))
    return " ".join(parts)
