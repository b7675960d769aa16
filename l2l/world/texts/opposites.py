"""Pairs of opposite words."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import fill, zipf

PAIRS = words.OPPOSITES
_FORMS = (
    "the opposite of {one} is {other} .",
    "{one} and {other} are opposites .",
    "it is not {one} , it is {other} .",
    "{person} said {one} , {person2} said {other} .",
    "is it {one} or {other} ? {person} says {other} .",
)


def opposite_scene(rng: random.Random) -> tuple[str, str]:
    """A word and its opposite, the commoner pairs more often."""
    one, other = zipf(rng, PAIRS)
    return (one, other) if rng.random() < 0.5 else (other, one)


def document(rng: random.Random) -> str:
    """A sentence with both words of a pair."""
    one, other = opposite_scene(rng)
    return fill(rng, rng.choice(_FORMS), {"one": one, "other": other})
