"""Who has more, who has fewer: two people, a small and a large amount, two names in the answer."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import LEXICON, fill, people, zipf

_OPENINGS = (
    "{first} has {amount} {items} . {second} has {amount2} {items} .",
    "{first} found {amount} {items} and {second} found {amount2} {items} .",
    "{first} owns {amount} {items} , {second} owns {amount2} .",
)
_RESULTS = (
    "{more} has more {items} than {less} .",
    "who has more {items} ? {more} .",
    "{less} has fewer {items} than {more} .",
    "who has fewer {items} ? {less} .",
    "who has the most {items} ? {more} .",
    "who is richer in {items} ? {more} .",
)


def count_scene(rng: random.Random) -> dict[str, str]:
    """Two people with amounts of one item; ``more`` names who has the large one. Which is named first is random."""
    more, less = people(rng, 2)
    holdings = [(more, rng.choice(words.LARGE_AMOUNTS)), (less, rng.choice(words.SMALL_AMOUNTS))]
    rng.shuffle(holdings)
    (first, amount), (second, amount2) = holdings
    scene = {"first": first, "amount": amount, "second": second, "amount2": amount2}
    return scene | {"more": more, "less": less, "items": zipf(rng, LEXICON["items"])}


def opening(rng: random.Random, scene: dict[str, str]) -> str:
    """The two counts of a scene in one of several forms."""
    return fill(rng, rng.choice(_OPENINGS), scene)


def document(rng: random.Random) -> str:
    """Two counts and some comparisons, or a plain order of two amounts."""
    if rng.random() < 0.1:
        return f"{rng.choice(words.LARGE_AMOUNTS)} is more than {rng.choice(words.SMALL_AMOUNTS)} ."
    scene = count_scene(rng)
    results = " ".join(fill(rng, form, scene) for form in rng.sample(_RESULTS, rng.choice((1, 2, 3))))
    return f"{opening(rng, scene)} {results}"
