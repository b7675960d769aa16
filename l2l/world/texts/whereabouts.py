"""People in rooms, and where each of them is."""

from __future__ import annotations

import random
from dataclasses import dataclass

from l2l.world import words
from l2l.world.grammar import fill, people

_MOVES = (
    "{who} went to the {room} .",
    "{who} is in the {room} .",
    "{who} walked into the {room} .",
    "{who} stayed in the {room} .",
)
_QUESTIONS = (
    "where is {who} ? in the {room} .",
    "{who} is in the {room} .",
    "where can we find {who} ? in the {room} .",
    "so {who} is in the {room} now .",
)


@dataclass(frozen=True)
class Whereabouts:
    """A short story, and its people with their rooms; ``empty`` rooms are not in the story."""

    story: str
    rooms: dict[str, str]
    empty: tuple[str, ...]


def whereabouts(rng: random.Random, count: int) -> Whereabouts:
    """``count`` people, each in a room of their own."""
    who, rooms = people(rng, count), rng.sample(words.ROOMS, len(words.ROOMS))
    placed = dict(zip(who, rooms, strict=False))
    story = " ".join(fill(rng, rng.choice(_MOVES), {"who": person, "room": room}) for person, room in placed.items())
    return Whereabouts(story, placed, tuple(rooms[count:]))


def document(rng: random.Random) -> str:
    """A story of two or three people, and where some of them are."""
    scene = whereabouts(rng, rng.choice((2, 2, 3)))
    asked = rng.sample(list(scene.rooms), rng.randint(1, len(scene.rooms)))
    answers = (fill(rng, rng.choice(_QUESTIONS), {"who": who, "room": scene.rooms[who]}) for who in asked)
    return " ".join((scene.story, *answers))
