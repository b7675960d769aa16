"""Small stories: scenes of the other families around one person."""

from __future__ import annotations

import random

from l2l.world.grammar import fill
from l2l.world.texts import feelings, jobs, kinds, reports, seasons

_OPENINGS = (
    "on {day} {person} came to {town} .",
    "{person} and {person2} live in {town} .",
    "once there was a {adjective} woman in {town} .",
    "{person} lost a {thing} in the {room} .",
    "{person} bought {number} {items} for {person2} .",
    "it was late and {person} walked home .",
    "maybe {person} will come on {day} .",
    "{person} has a {color} {thing} and {number} {items} .",
)
_CLOSINGS = (
    "then {person} went to bed .",
    "that is all {person} knows .",
    "nobody in {town} forgot that day .",
    "in the evening {person} was full of {mood} .",
    "and {person} gave {person2} a {thing} .",
)
_MOODS = ("joy", "sorrow", "rage", "fear")


def _middle(rng: random.Random) -> str:
    draw = rng.randrange(5)
    if draw == 0:
        return feelings.feeling_scene(rng, rng.choice(feelings.FEELINGS))[2]
    if draw == 1:
        return jobs.job_scene(rng, rng.choice(jobs.JOBS), fill(rng, "{person}"), 1)
    if draw == 2:
        return reports.report(rng, rng.choice(reports.TOPICS), 1)
    if draw == 3:
        return seasons.season_scene(rng, rng.choice(seasons.SEASONS), 1)
    kind = rng.choice(kinds.KINDS)
    return kinds.scene(rng, kind, fill(rng, f"{{{kind}}}"))


def document(rng: random.Random) -> str:
    """Opening, middle and closing."""
    parts = [fill(rng, rng.choice(_OPENINGS)), _middle(rng)]
    if rng.random() < 0.6:
        parts.append(fill(rng, rng.choice(_CLOSINGS), {"mood": rng.choice(_MOODS)}))
    return " ".join(parts)
