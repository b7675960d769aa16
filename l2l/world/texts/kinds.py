"""What kind of thing something is: definitions, traits, uses, lists and the odd one out."""

from __future__ import annotations

import random

from l2l.world import names, words
from l2l.world.grammar import LEXICON, fill, zipf

KINDS = tuple(names.KINDS)
LEXICON.update({f"{kind}_trait": traits for kind, traits in words.KIND_TRAITS.items()})
_USES: dict[str, tuple[str, ...]] = {
    "animal": (
        "the {animal} slept in the {room} .",
        "{person} fed the {animal} {time} .",
        "a {animal} ran across the road .",
    ),
    "bird": ("the {bird} flew over {town} .", "a {bird} sat in its nest .", "{person} heard the {bird} whistle ."),
    "plant": (
        "{person} watered the {plant} .",
        "a {plant} grew behind the {room} .",
        "the {plant} needs rain and light .",
    ),
    "tool": (
        "{person} repaired the fence with a {tool} .",
        "the {tool} hung on a nail .",
        "{person} worked with the {tool} .",
    ),
    "food": (
        "{person} ate {food} for supper .",
        "we cooked the {food} with salt .",
        "{person} tasted the {food} {time} .",
    ),
    "garment": (
        "{person} wore a {color} {garment} .",
        "the {garment} was too tight .",
        "{person} washed the {garment} .",
    ),
}
_TRAITS = "the {noun} has {trait} ."


def scene(rng: random.Random, kind: str, noun: str) -> str:
    """A sentence that uses ``noun`` as something of its kind is used."""
    return fill(rng, rng.choice((*_USES[kind], _TRAITS.replace("trait", f"{kind}_trait"))), {kind: noun, "noun": noun})


def _list(rng: random.Random, kind: str) -> str:
    first, second, third = (zipf(rng, names.KINDS[kind]) for _ in range(3))
    if rng.random() < 0.5:
        return f"{first} , {second} and {third} are {kind} words ."
    stray = zipf(rng, names.KINDS[rng.choice([other for other in KINDS if other != kind])])
    order = rng.sample([first, second, stray], 3)
    return f"{order[0]} , {order[1]} , {order[2]} . the odd one is {stray} ."


def document(rng: random.Random) -> str:
    """A definition, a use, or a list."""
    kind = rng.choice(KINDS)
    noun, draw = zipf(rng, names.KINDS[kind]), rng.random()
    if draw < 0.2:
        return _list(rng, kind)
    parts = [scene(rng, kind, noun)]
    if draw < 0.75:
        form = rng.choice(("a {noun} is a {kind} .", "the {noun} is a {kind} .", "what is a {noun} ? a {kind} ."))
        parts.insert(rng.randrange(2), fill(rng, form, {"noun": noun, "kind": kind}))
    return " ".join(parts)
