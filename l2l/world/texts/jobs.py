"""Jobs and what they work with."""

from __future__ import annotations

import random

from l2l.world import words
from l2l.world.grammar import LEXICON, fill

JOBS = tuple(words.JOBS)
LEXICON.update({f"{job}_work": things for job, things in words.JOBS.items()})
_FORMS = (
    "{person} knows a lot about {work} .",
    "all day {person} has to do with {work} and {work2} .",
    "{person} spoke about the {work} .",
    "{person} comes home from the {work} .",
    "{person} dreams of {work} .",
)
_CUES = ("{person} is a {job} .", "what is {person} ? a {job} .", "{person} works as a {job} in {town} .")
_PLACES = "every {job} is often at the {place} ."


def job_scene(rng: random.Random, job: str, person: str, length: int) -> str:
    """``length`` sentences on what ``person`` works with."""
    forms = (form.replace("{work", f"{{{job}_work") for form in rng.sample(_FORMS, length))
    return " ".join(fill(rng, form, {"person": person}) for form in forms)


def document(rng: random.Random) -> str:
    """Someone's work, with the name of the job before or after."""
    job, person = rng.choice(JOBS), fill(rng, "{person}")
    parts = [
        job_scene(rng, job, person, rng.choice((1, 1, 2))),
        fill(rng, rng.choice(_CUES), {"person": person, "job": job}),
    ]
    if rng.random() < 0.1:
        return fill(rng, _PLACES, {"job": job, "place": words.WORKPLACES[job]})
    if rng.random() < 0.3:
        parts.reverse()
    return " ".join(parts)
