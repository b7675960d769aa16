"""Made-up names of the small world, composed of syllables by a fixed recipe: the same words in every process."""

from __future__ import annotations

import random
from collections.abc import Collection

from l2l.world import words

_ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sh",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ei", "or", "ar", "en"]
_MIDDLES = ["b", "d", "g", "k", "l", "ll", "m", "n", "nn", "r", "rr", "s", "t", "v", "x"]

WOMEN_COUNT, MEN_COUNT, TOWN_COUNT, NOUN_COUNT = 280, 280, 280, 85


def _coin(rng: random.Random, endings: tuple[str, ...]) -> str:
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES) + rng.choice(endings)


def _coin_many(label: str, count: int, endings: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """``count`` fresh words; ``taken`` grows by them, so that no word has two meanings."""
    rng = random.Random(f"l2l small world {label}")
    coined: list[str] = []
    while len(coined) < count:
        word = _coin(rng, endings)
        if word not in taken:
            taken.add(word)
            coined.append(word)
    return tuple(coined)


def _real_words() -> set[str]:
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict):
            collect(tuple(value))
            collect(tuple(value.values()))
        elif isinstance(value, Collection):
            for part in value:
                collect(part)

    for name, value in vars(words).items():
        if name.isupper():
            collect(value)
    return found


_taken = _real_words()
WOMEN = _coin_many("women", WOMEN_COUNT, ("a", "ia", "ela", "ine", "ira"), _taken)
MEN = _coin_many("men", MEN_COUNT, ("on", "us", "ek", "o", "ard"), _taken)
TOWNS = _coin_many("towns", TOWN_COUNT, ("ton", "mouth", "burg", "ford", "ville"), _taken)
KINDS = {
    kind: real + _coin_many(kind, NOUN_COUNT, ("im", "ot", "ul", "ap", "ern"), _taken)
    for kind, real in words.KINDS.items()
}
"""Kinds of things: every kind begins with its common real nouns, rare made-up ones follow."""
