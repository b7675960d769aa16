"""Templates with slots, filled by Zipf-distributed draws: the few moves every text of the world is made of."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar

from l2l.world import names, words

Value = TypeVar("Value")

LEXICON: dict[str, tuple[str, ...]] = {
    "woman": names.WOMEN,
    "man": names.MEN,
    "town": names.TOWNS,
    "adjective": words.ADJECTIVES,
    "time": words.TIMES,
    "room": words.ROOMS,
    "thing": words.THINGS,
    "items": words.COUNTED,
    "color": words.COLORS,
    "number": words.NUMBERS,
    "day": words.DAYS,
    "praise": words.PRAISE,
    "blame": words.BLAME,
    **names.KINDS,
}
"""Slot name to words, the most frequent first."""


def zipf(rng: random.Random, ranked: Sequence[Value]) -> Value:
    """A draw whose frequency falls as one over the rank."""
    return ranked[min(int((len(ranked) + 1) ** rng.random()), len(ranked)) - 1]


@cache
def _parts(template: str) -> tuple[str, ...]:
    return tuple(re.split(r"\{(\w+)\}", template))


def fill(rng: random.Random, template: str, bound: Mapping[str, str] | None = None) -> str:
    """The template with every ``{slot}`` filled: from ``bound``, else a Zipf draw from the slot's words.

    A digit at a slot's end tells two slots of one kind apart; a repeated slot keeps its word. ``{person}`` is a name.
    """
    known = dict(bound or {})
    out: list[str] = []
    for position, part in enumerate(_parts(template)):
        if position % 2 == 0:
            out.append(part)
            continue
        if part not in known:
            known[part] = _draw(rng, part.rstrip("0123456789"))
        out.append(known[part])
    return "".join(out)


def _draw(rng: random.Random, slot: str) -> str:
    if slot == "person":
        slot = "woman" if rng.random() < 0.5 else "man"
    return zipf(rng, LEXICON[slot])


def people(rng: random.Random, count: int) -> list[str]:
    """``count`` different names of either gender."""
    return distinct(rng, count, names.WOMEN + names.MEN) if rng.random() < 0.1 else _zipf_people(rng, count)


def _zipf_people(rng: random.Random, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        name = _draw(rng, "person")
        if name not in found:
            found.append(name)
    return found


def distinct(rng: random.Random, count: int, values: Sequence[Value]) -> list[Value]:
    """``count`` different values in random order, each equally likely."""
    return rng.sample(list(values), count)


def sentences(rng: random.Random, templates: Sequence[str], count: int, bound: Mapping[str, str] | None = None) -> str:
    """``count`` different templates, filled and joined."""
    return " ".join(fill(rng, template, bound) for template in distinct(rng, count, templates))


def tidy(text: str) -> str:
    """Text as people write it: no space before punctuation, ``an`` before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r" (?=[.,?!:;])", "", text))
