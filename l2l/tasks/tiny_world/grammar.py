"""Made-up names, and templates with slots that are filled by Zipf-distributed draws of words.

A slot is written ``{town}``. Names are composed of syllables by a fixed recipe: the same words in every process.
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from l2l.tasks.tiny_world import words

Value = TypeVar("Value")

_ONSETS = words.word_list("b br d dr f g gr h j k kl l m n p pr r s sh t th tr v w z")
_VOWELS = words.word_list("a e i o u ai ei or ar en")
_MIDDLES = words.word_list("b d g k l ll m n nn r rr s t v x")


def _coin(label: str, count: int, endings: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """``count`` fresh words; ``taken`` grows by them, so that no word has two meanings."""
    rng = random.Random(f"l2l small world {label}")
    coined: list[str] = []
    while len(coined) < count:
        word = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES) + rng.choice(endings)
        if word not in taken:
            taken.add(word)
            coined.append(word)
    return tuple(coined)


def _real_words(group: Any) -> set[str]:
    """All words in nested groups, and the names of the inner groups."""
    if isinstance(group, str):
        return {group}
    parts = (*group, *group.values()) if isinstance(group, dict) else group
    return set().union(*map(_real_words, parts))


_taken = _real_words(tuple(words.GROUPS.values()))
WOMEN = _coin("women", 280, ("a", "ia", "ela", "ine", "ira"), _taken)
MEN = _coin("men", 280, ("on", "us", "ek", "o", "ard"), _taken)
TOWNS = _coin("towns", 280, ("ton", "mouth", "burg", "ford", "ville"), _taken)
KINDS = {kind: real + _coin(kind, 85, ("im", "ot", "ul", "ap", "ern"), _taken) for kind, real in words.KINDS.items()}
"""Kinds of things: every kind begins with its common real nouns, rare made-up ones follow."""

LEXICON: dict[str, tuple[str, ...]] = {
    "woman": WOMEN,
    "man": MEN,
    "town": TOWNS,
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
    **KINDS,
    **{f"{kind}_trait": traits for kind, traits in words.KIND_TRAITS.items()},
    **{f"{season}_sign": signs for season, signs in words.SEASONS.items()},
    **{f"{job}_work": things for job, things in words.JOBS.items()},
    **{f"{topic}_{role}": group for topic, roles in words.TOPICS.items() for role, group in roles.items()},
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
    if rng.random() < 0.1:
        return rng.sample(WOMEN + MEN, count)
    found: list[str] = []
    while len(found) < count:
        name = _draw(rng, "person")
        if name not in found:
            found.append(name)
    return found


def tidy(text: str) -> str:
    """Text as people write it: no space before punctuation, ``an`` before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r" (?=[.,?!:;])", "", text))
