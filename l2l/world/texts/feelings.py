"""What happens to people and how they feel about it."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import fill, zipf
from l2l.world.names import MEN, WOMEN

FEELINGS = tuple(words.FEELINGS)
_EVENTS: dict[str, tuple[str, ...]] = {
    "happy": (
        "won a prize",
        "got a letter from a friend",
        "found the lost {thing}",
        "danced at a wedding",
        "was given a {thing}",
        "heard good news",
        "passed the exam",
        "came home to {town} at last",
        "got a puppy",
        "had a birthday",
    ),
    "sad": (
        "lost a friend",
        "heard bad news",
        "said goodbye to {town}",
        "buried the old dog",
        "was left alone",
        "failed the exam",
        "sat by an empty chair",
        "lost the {thing} of the family",
        "stood at a grave",
        "missed the children",
    ),
    "angry": (
        "was cheated by a seller",
        "was insulted by {person}",
        "saw {person} break the {thing}",
        "had to wait for hours",
        "found the {thing} stolen",
        "was blamed for nothing",
        "paid twice for a {thing}",
        "heard a lie from {person}",
        "was pushed in the street",
        "got the wrong {thing} again",
    ),
    "afraid": (
        "heard steps in the dark",
        "met a wolf in the forest",
        "saw a ghost in the {room}",
        "stood near a deep cliff",
        "was lost in the fog at night",
        "saw a snake",
        "heard a scream from the {room}",
        "was followed by a stranger",
        "felt the earth shake",
        "was alone in the {room} at night",
    ),
}
_CUES = (
    "{pronoun} felt {feeling} .",
    "{pronoun} was {feeling} .",
    "{pronoun} {sign} .",
    "how did {name} feel ? {feeling} .",
)
_SIGNS = {
    "happy": "smiled cheered danced laughed",
    "sad": "wept sighed mourned sobbed",
    "angry": "shouted stamped cursed scolded",
    "afraid": "trembled fled screamed shivered",
}
_NAMES = {
    "happy": "happy delighted glad",
    "sad": "sad gloomy unhappy",
    "angry": "angry furious cross",
    "afraid": "afraid terrified scared",
}
_NOUNS = {"happy": "joy", "sad": "sorrow", "angry": "rage", "afraid": "fear"}


def feeling_scene(rng: random.Random, feeling: str) -> tuple[str, str, str]:
    """Name, pronoun, and a sentence of what happened."""
    name, pronoun = (zipf(rng, WOMEN), "she") if rng.random() < 0.5 else (zipf(rng, MEN), "he")
    return name, pronoun, f"{name} {fill(rng, rng.choice(_EVENTS[feeling]))} ."


def document(rng: random.Random) -> str:
    """An event and the feeling after it."""
    feeling = rng.choice(FEELINGS)
    name, pronoun, event = feeling_scene(rng, feeling)
    bound = {"name": name, "pronoun": pronoun, "sign": zipf(rng, _SIGNS[feeling].split())}
    bound["feeling"] = zipf(rng, _NAMES[feeling].split())
    parts = [event, fill(rng, rng.choice(_CUES), bound)]
    if rng.random() < 0.2:
        parts.append(f"it was {_NOUNS[feeling]} .")
    return " ".join(parts)
