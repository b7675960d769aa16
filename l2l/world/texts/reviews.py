"""Reviews at five levels of content."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import fill, zipf

LEVELS = len(words.LEVELS)
_FORMS = (
    "the {part} was {quality} .",
    "{person} found the {part} {quality} .",
    "we saw a {quality} {part} .",
    "what a {quality} {part} !",
    "the {part} looked {quality} to {person} .",
    "a {quality} {subject} with a {quality2} {part} .",
)
_VERDICTS = (
    "in all the {subject} was {quality} .",
    "{person} gives it {stars} stars .",
    "{person} calls it {quality} .",
    "so the {subject} gets {stars} of five points .",
    "{person} {opinion} the {subject} .",
)


def _opinion(rng: random.Random, level: int) -> str:
    good = level > 2 or (level == 2 and rng.random() < 0.5)
    return zipf(rng, words.PRAISE if good else words.BLAME)


def _sentence(rng: random.Random, form: str, subject: str, level: int) -> str:
    bound = {
        "part": zipf(rng, words.REVIEWED[subject]),
        "subject": subject,
        "quality": zipf(rng, words.LEVELS[level]),
        "quality2": zipf(rng, words.LEVELS[level]),
        "stars": words.NUMBERS[level],
        "opinion": _opinion(rng, level),
    }
    return fill(rng, form, bound)


def _near(rng: random.Random, level: int, stray: float) -> int:
    """``level``, or with probability ``stray`` a neighbour of it."""
    moved = level + rng.choice((-1, 1)) if rng.random() < stray else level
    return min(max(moved, 0), LEVELS - 1)


def review(rng: random.Random, level: int, length: int = 2, stray: float = 0.2) -> str:
    """``length`` sentences of praise or blame at ``level`` (0 worst, 4 best); some stray to a neighbouring level."""
    subject = rng.choice(tuple(words.REVIEWED))
    body = (_sentence(rng, form, subject, _near(rng, level, stray)) for form in rng.sample(_FORMS, length))
    return " ".join(body)


def document(rng: random.Random) -> str:
    """A review with its opening and, mostly, a verdict."""
    level, subject = rng.randrange(LEVELS), rng.choice(tuple(words.REVIEWED))
    parts = [fill(rng, "{person} wrote about the {subject} .", {"subject": subject})] if rng.random() < 0.3 else []
    for form in rng.sample(_FORMS, rng.choice((1, 2, 2, 3))):
        parts.append(_sentence(rng, form, subject, _near(rng, level, 0.15)))
    if rng.random() < 0.7:
        parts.append(_sentence(rng, rng.choice(_VERDICTS), subject, level))
    return " ".join(parts)
