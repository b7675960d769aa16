"""Loose phrases: further words for what the other families name, so that the model knows more than one word for it."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import fill, zipf
from l2l.world.texts import reports

WORLDS = {
    "sport": "games",
    "cooking": "meals",
    "music": "songs",
    "science": "research",
    "trade": "money",
    "crime": "thieves",
}
"""Another word for each topic."""
SORTS = {"person": "people", "place": "towns", "number": "numbers", "day": "days", "reason": "reasons"}
"""Another word for each sort of answer."""
_FRAMES = (
    "these words belong to the world of {word} .",
    "it must be some sort of {kind} .",
    "they said it was {quality} .",
    "summary : {quality} .",
    "does it follow that {person} is ill ? this is {answer} .",
    "{person} asked about a {thing} , the answer is {answer} .",
    "{person} guessed that it was {month} .",
    "this is a question of {sort} .",
    "{person} showed a {thing} to {person2} .",
    "now where is {person} then ?",
    "and who has more then ? {person} .",
    "every morning {person} goes to the {place} .",
    "what happened then ? {person} came home .",
    "{person} thought of it on {day} .",
    "{person} counted the {items} .",
    "{person} was full of {mood} .",
    "not {one} but {other} .",
)


def _bound(rng: random.Random) -> dict[str, str]:
    one, other = zipf(rng, words.OPPOSITES)[0], zipf(rng, words.OPPOSITES)[1]
    return {
        "word": rng.choice(tuple(WORLDS.values())),
        "kind": rng.choice(tuple(words.KINDS)),
        "quality": zipf(rng, rng.choice(words.LEVELS)),
        "answer": rng.choice(("right", "wrong", "open")),
        "month": rng.choice([month for months in words.MONTHS.values() for month in months]),
        "sort": rng.choice(tuple(SORTS.values())),
        "place": rng.choice(tuple(words.WORKPLACES.values())),
        "mood": rng.choice(("joy", "sorrow", "rage", "fear")),
        "one": one,
        "other": other,
    }


def document(rng: random.Random) -> str:
    """A topic's other word beside a report on it, or a phrase whose blank is filled at random."""
    if rng.random() < 0.4:
        topic = rng.choice(reports.TOPICS)
        return (
            f"{reports.report(rng, topic, 1)} {fill(rng, '{person} often talks of {word} .', {'word': WORLDS[topic]})}"
        )
    return fill(rng, rng.choice(_FRAMES), _bound(rng))
