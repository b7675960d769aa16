"""Causes and their effects."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import fill, people, zipf

_PAIRS = (
    ("the {thing} fell from the shelf", "the {thing} broke"),
    ("{person} forgot the key", "{person} could not open the door"),
    ("the rain did not stop", "the river rose"),
    ("{person} ate nothing all day", "{person} was hungry"),
    ("{person} worked all night", "{person} was tired"),
    ("the road was full of ice", "the car slid into the ditch"),
    ("{person} missed the train", "{person} came late"),
    ("the candle burned down", "the {room} became dark"),
    ("{person} told a joke", "everyone laughed"),
    ("the sun shone all day", "the snow melted"),
    ("{person} stepped on a nail", "the foot of {person} hurt"),
    ("the baby was hungry", "the baby cried"),
    ("{person} left the window open", "the {room} became cold"),
    ("the fire reached the roof", "the house burned down"),
    ("nobody watered the plants", "the plants died"),
    ("{person} studied every evening", "{person} passed the exam"),
    ("the dog saw a stranger", "the dog barked"),
    ("{person} put sugar in the tea", "the tea tasted sweet"),
    ("the battery was empty", "the phone went silent"),
    ("{person} broke the law", "the police came for {person}"),
    ("{person} caught a cold", "{person} stayed in bed"),
    ("the wind was strong", "the tree fell on the fence"),
    ("{person} saved every coin", "{person} became rich"),
    ("the milk stood in the sun", "the milk turned sour"),
    ("{person} lost the map", "{person} could not find the way"),
    ("the bell rang", "the pupils left the school"),
    ("{person} dropped the {thing} into the lake", "the {thing} sank"),
    ("the cat jumped on the table", "the plates fell down"),
    ("{person} shouted at {person2}", "{person2} ran away"),
    ("{person} helped {person2}", "{person2} thanked {person}"),
    ("the bridge was closed", "the cars drove around the valley"),
    ("{person} forgot the umbrella", "{person} got wet"),
    ("the soup was too hot", "{person} burned the tongue"),
    ("{person} painted the wall {color}", "the wall is {color} now"),
    ("the shop was out of bread", "{person} went home without bread"),
    ("{person} sat in the sun too long", "the skin of {person} turned red"),
    ("the {thing} was stolen", "{person} called a detective"),
    ("the boat had a hole", "the boat filled with water"),
)
_JOINTS = (
    "{cause} , so {effect} .",
    "{effect} because {cause} .",
    "{cause} . as a result {effect} .",
    "why ? because {cause} . {effect} .",
    "first {cause} , then {effect} .",
)


def cause_scene(rng: random.Random) -> tuple[str, str, str]:
    """A cause, its effect, and the effect of another cause, all in the same names; without full stops."""
    (cause, effect), (_, other) = rng.sample(_PAIRS, 2)
    person, person2 = people(rng, 2)
    bound = {"person": person, "person2": person2, "thing": zipf(rng, words.THINGS), "room": rng.choice(words.ROOMS)}
    bound["color"] = zipf(rng, words.COLORS)
    return fill(rng, cause, bound), fill(rng, effect, bound), fill(rng, other, bound)


def document(rng: random.Random) -> str:
    """A cause joined to its effect."""
    cause, effect, _ = cause_scene(rng)
    return fill(rng, rng.choice(_JOINTS), {"cause": cause, "effect": effect})
