"""A premise and a claim that follows from it, contradicts it, or is left open by it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from l2l.world import names, words
from l2l.world.grammar import LEXICON, fill, people, zipf

ANSWERS = ("yes", "no", "maybe")
_ADJECTIVE_PAIRS = words.OPPOSITES[:30]


@dataclass(frozen=True)
class _Form:
    premise: str
    claims: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    """Claims that follow, that contradict, and that stay open."""


_FORMS = (
    _Form(
        "the {thing} in the {room} is {quality} .",
        (
            ("the {thing} is {quality}", "the {thing} is not {contrary}"),
            ("the {thing} is {contrary}", "the {thing} is not {quality}"),
            ("the {thing} is {color}", "{person} likes the {thing}"),
        ),
    ),
    _Form(
        "{person1} gave the {thing} to {person2} .",
        (
            ("{person2} has the {thing}", "{person2} got the {thing}"),
            ("{person1} has the {thing}", "{person1} kept the {thing}"),
            ("{person2} likes the {thing}", "the {thing} is {color}"),
        ),
    ),
    _Form(
        "{person1} bought a {noun} in {town} .",
        (
            ("{person1} bought a {kind}", "{person1} was in {town}"),
            ("{person1} bought nothing", "{person1} was never in {town}"),
            ("{person1} bought a {color} {kind}", "{person1} likes {town}"),
        ),
    ),
    _Form(
        "{person1} is in the {room1} .",
        (
            ("{person1} is not in the {room2}", "the {room1} is not empty"),
            ("{person1} is in the {room2}", "the {room1} is empty"),
            ("{person1} is {adjective}", "{person2} is in the {room1}"),
        ),
    ),
    _Form(
        "all the {items} in {town} are {color1} .",
        (
            ("some {items} in {town} are {color1}", "{town} has {color1} {items}"),
            ("no {items} in {town} are {color1}", "some {items} in {town} are {color2}"),
            ("all the {items} are {color1}", "{person1} likes the {items}"),
        ),
    ),
    _Form(
        "{person1} is {quality} and {person2} is {contrary} .",
        (
            ("{person1} is not {contrary}", "{person2} is {contrary}"),
            ("{person1} is {contrary}", "{person2} is {quality}"),
            ("{person1} likes {person2}", "{person2} is {adjective}"),
        ),
    ),
)
_CUES = (
    "is it true that {claim} ? {answer} .",
    "can we say that {claim} ? {answer} .",
    "{claim} ? {answer} .",
    "{claim} : {verdict} .",
)
_VERDICTS = {"yes": "true", "no": "false", "maybe": "unknown"}


def _scene(rng: random.Random) -> dict[str, str]:
    """Words that a premise and its claims share."""
    pair = list(rng.choice(_ADJECTIVE_PAIRS))
    rng.shuffle(pair)
    kind = rng.choice(tuple(names.KINDS))
    scene = {"quality": pair[0], "contrary": pair[1], "kind": kind, "noun": zipf(rng, names.KINDS[kind])}
    scene["thing"], scene["items"], scene["town"] = (zipf(rng, LEXICON[slot]) for slot in ("thing", "items", "town"))
    for slot in ("room", "color"):
        scene[slot], scene[f"{slot}2"] = rng.sample(LEXICON[slot], 2)
        scene[f"{slot}1"] = scene[slot]
    scene["person1"], scene["person2"], scene["person"] = people(rng, 3)
    return scene


def statement(rng: random.Random, answer: int) -> tuple[str, str]:
    """A premise, with its full stop, and a claim, without; ``answer`` indexes ``ANSWERS``."""
    form, scene = rng.choice(_FORMS), _scene(rng)
    return fill(rng, form.premise, scene), fill(rng, rng.choice(form.claims[answer]), scene)


def _judged(rng: random.Random, form: _Form, scene: dict[str, str]) -> str:
    answer = rng.randrange(len(ANSWERS))
    claim = fill(rng, rng.choice(form.claims[answer]), scene)
    bound = {"claim": claim, "answer": ANSWERS[answer], "verdict": _VERDICTS[ANSWERS[answer]]}
    return fill(rng, rng.choice(_CUES), bound)


def document(rng: random.Random) -> str:
    """A premise with one or two claims and what becomes of them."""
    form, scene = rng.choice(_FORMS), _scene(rng)
    claims = (_judged(rng, form, scene) for _ in range(rng.choice((1, 2, 2))))
    return " ".join((fill(rng, form.premise, scene), *claims))
