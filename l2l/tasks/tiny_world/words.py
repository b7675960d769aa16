"""Real English words of the tiny world, grouped by meaning, and templates of its sentences: ``words.json``, ``templates.json``.

The order of the words in a group is their frequency rank.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

Words: TypeAlias = tuple[str, ...]

_FOLDER = Path(__file__).parent
TEMPLATES: dict[str, Any] = json.loads((_FOLDER / "templates.json").read_text(encoding="utf-8"))


def word_list(text: str) -> Words:
    """The words of a text."""
    return tuple(text.split())


def _split(value: Any) -> Any:
    """The same nested groups, with tuples of words in place of texts."""
    if isinstance(value, dict):
        return {name: _split(part) for name, part in value.items()}
    return word_list(value) if isinstance(value, str) else tuple(map(_split, value))


GROUPS: dict[str, Any] = _split(json.loads((_FOLDER / "words.json").read_text(encoding="utf-8")))
"""All words, by the name of their group."""

TOPICS: dict[str, dict[str, Words]] = GROUPS["topics"]
LEVELS: tuple[Words, ...] = GROUPS["levels"]
"""Adjectives of praise, from the worst to the best."""
PRAISE: Words = GROUPS["praise"]
BLAME: Words = GROUPS["blame"]
REVIEWED: dict[str, Words] = GROUPS["reviewed"]
"""What is reviewed, and its parts."""
SEASONS: dict[str, Words] = GROUPS["seasons"]
MONTHS: dict[str, Words] = GROUPS["months"]
OPPOSITES: tuple[Words, ...] = GROUPS["opposites"]
"""Pairs, of adjectives first."""
KINDS: dict[str, Words] = GROUPS["kinds"]
KIND_TRAITS: dict[str, Words] = GROUPS["kind_traits"]
JOBS: dict[str, Words] = GROUPS["jobs"]
WORKPLACES: dict[str, str] = dict(zip(JOBS, GROUPS["workplaces"], strict=True))
FEELINGS: dict[str, Words] = GROUPS["feelings"]
ROOMS: Words = GROUPS["rooms"]
THINGS: Words = GROUPS["things"]
COLORS: Words = GROUPS["colors"]
NUMBERS: Words = GROUPS["numbers"]
SMALL_AMOUNTS: Words = GROUPS["small_amounts"]
LARGE_AMOUNTS: Words = GROUPS["large_amounts"]
