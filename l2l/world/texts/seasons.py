"""The four seasons: what is seen in them, and their months."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import LEXICON, fill

SEASONS = tuple(words.SEASONS)
LEXICON.update({f"{season}_sign": signs for season, signs in words.SEASONS.items()})
_FORMS = (
    "{person} saw {sign} in {town} .",
    "there was {sign} near the {room} .",
    "the children talked about {sign} .",
    "{person} dreamed of {sign} .",
    "{sign} and more {sign2} in {town} .",
)
_CUES = (
    "it is {season} .",
    "it was {season} in {town} .",
    "the {season} has come .",
    "{person} loves the {season} .",
    "it is {month} , the {season} is here .",
    "it was a day in {month} .",
)


def season_scene(rng: random.Random, season: str, length: int) -> str:
    """``length`` sentences with signs of the season."""
    forms = (form.replace("{sign", f"{{{season}_sign") for form in rng.sample(_FORMS, length))
    return " ".join(fill(rng, form) for form in forms)


def document(rng: random.Random) -> str:
    """Signs of a season and its name, or a month and its season."""
    season = rng.choice(SEASONS)
    bound = {"season": season, "month": rng.choice(words.MONTHS[season])}
    if rng.random() < 0.15:
        return fill(rng, "{month} is a month of {season} .", bound)
    return f"{season_scene(rng, season, rng.choice((1, 1, 2)))} {fill(rng, rng.choice(_CUES), bound)}"
