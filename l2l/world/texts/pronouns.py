"""A woman, a man, and a pronoun that means one of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from l2l.world import names
from l2l.world.grammar import fill, zipf

_LINKS = ("thanked", "met", "called", "visited", "helped", "saw", "greeted", "phoned", "warned", "followed")
_REASONS = (
    "was ill",
    "was tired",
    "had won a prize",
    "was leaving {town}",
    "had lost a {thing}",
    "was kind",
    "had time",
    "knew the way",
    "had a {thing}",
    "was alone",
    "was in {town}",
    "sold a {thing}",
    "was hungry",
    "had a new {thing}",
)
_ANSWERS = (
    "who {reason} ? {name} .",
    "so {name} {reason} .",
    "it was {name} who {reason} .",
)


@dataclass(frozen=True)
class Pronoun:
    """``sentence`` says ``pronoun reason``; ``name`` is who is meant, ``other`` who is not."""

    sentence: str
    pronoun: str
    reason: str
    name: str
    other: str


def pronoun_scene(rng: random.Random) -> Pronoun:
    """One woman and one man in random order; the pronoun's gender tells who is meant."""
    woman, man = zipf(rng, names.WOMEN), zipf(rng, names.MEN)
    first, second = rng.sample([woman, man], 2)
    name, other, pronoun = (woman, man, "she") if rng.random() < 0.5 else (man, woman, "he")
    reason = fill(rng, rng.choice(_REASONS))
    return Pronoun(f"{first} {rng.choice(_LINKS)} {second} because {pronoun} {reason} .", pronoun, reason, name, other)


def document(rng: random.Random) -> str:
    """A sentence with a pronoun and who was meant, or someone's gender."""
    scene = pronoun_scene(rng)
    if rng.random() < 0.15:
        return f"{scene.name} is a {'woman' if scene.pronoun == 'she' else 'man'} ."
    return f"{scene.sentence} {fill(rng, rng.choice(_ANSWERS), {'reason': scene.reason, 'name': scene.name})}"
