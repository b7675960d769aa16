"""Texts of the tiny world: reports, reviews, statements, questions and scenes from people's lives.

Templates (``templates.json``) have blanks before punctuation; :func:`l2l.tasks.tiny_world.grammar.tidy` closes them.
"""

import random
import re
from dataclasses import dataclass

from l2l.tasks.tiny_world import words
from l2l.tasks.tiny_world.grammar import KINDS, LEXICON, MEN, WOMEN, fill, people, zipf

FEELINGS = tuple(words.FEELINGS)
JOBS = tuple(words.JOBS)
SEASONS = tuple(words.SEASONS)
TOPICS = tuple(words.TOPICS)
LEVELS = len(words.LEVELS)
SORTS = ("person", "place", "number", "day", "reason")
"""Of answers that questions ask for."""
ANSWERS = ("yes", "no", "maybe")
"""Whether a claim follows from a premise, contradicts it, or is left open by it."""

_TEMPLATES = words.TEMPLATES
REVIEW_FORMS: list[str] = _TEMPLATES["reviews"]
TOPIC_SYNONYMS: dict[str, str] = _TEMPLATES["topics"]["synonyms"]
"""Another word for each topic, which a task asks for; only a few texts of pretraining tell that it means the topic."""
_TOPIC_FORMS = {
    topic: [re.sub(r"\{(who|did|what|where|how)\}", rf"{{{topic}_\1}}", form) for form in _TEMPLATES["topics"]["about"]]
    for topic in TOPICS
}


def cause_scene(rng: random.Random) -> tuple[str, str, str]:
    """A cause, its effect, and the effect of another cause, all in the same names; without full stops."""
    (cause, effect), (_, other) = rng.sample(_TEMPLATES["effects"], 2)
    person, person2 = people(rng, 2)
    bound = {"person": person, "person2": person2, "thing": zipf(rng, words.THINGS), "room": rng.choice(words.ROOMS)}
    bound["color"] = zipf(rng, words.COLORS)
    return fill(rng, cause, bound), fill(rng, effect, bound), fill(rng, other, bound)


def feeling_scene(rng: random.Random, feeling: str) -> tuple[str, str, str]:
    """Name, pronoun, and a sentence of what happened."""
    name, pronoun = (zipf(rng, WOMEN), "she") if rng.random() < 0.5 else (zipf(rng, MEN), "he")
    return name, pronoun, f"{name} {fill(rng, rng.choice(_TEMPLATES['events'][feeling]))} ."


def job_scene(rng: random.Random, job: str, person: str, length: int) -> str:
    """``length`` sentences on what ``person`` works with."""
    forms = (form.replace("{work", f"{{{job}_work") for form in rng.sample(_TEMPLATES["jobs"], length))
    return " ".join(fill(rng, form, {"person": person}) for form in forms)


def season_scene(rng: random.Random, season: str, length: int) -> str:
    """``length`` sentences with signs of the season."""
    forms = (form.replace("{sign", f"{{{season}_sign") for form in rng.sample(_TEMPLATES["seasons"], length))
    return " ".join(fill(rng, form) for form in forms)


def question(rng: random.Random, sort: str) -> str:
    """A question that asks for ``sort``, with its question mark."""
    return fill(rng, rng.choice(_TEMPLATES["questions"][sort]))


def report(rng: random.Random, topic: str, about: int, neutral: int = 0, other: int = 0) -> str:
    """A report with so many sentences about ``topic``, without any topic, and about one other topic, shuffled."""
    stray = rng.choice([name for name in TOPICS if name != topic])
    # Each form on the topic is "sampled" from itself, a draw that has to stay: the corpus and all rows depend on it.
    parts = [fill(rng, rng.sample([form], 1)[0]) for form in rng.sample(_TOPIC_FORMS[topic], about)]
    parts += [fill(rng, form) for form in rng.sample(_TEMPLATES["topics"]["neutral"], neutral)]
    parts += [fill(rng, form) for form in rng.sample(_TOPIC_FORMS[stray], other)]
    rng.shuffle(parts)
    return " ".join(parts)


def review_sentence(rng: random.Random, form: str, subject: str, level: int) -> str:
    """The form filled with words for ``subject`` at ``level``."""
    bound = {
        "part": zipf(rng, words.REVIEWED[subject]),
        "subject": subject,
        "quality": zipf(rng, words.LEVELS[level]),
        "quality2": zipf(rng, words.LEVELS[level]),
        "stars": words.NUMBERS[level],
    }
    good = level > 2 or (level == 2 and rng.random() < 0.5)
    bound["opinion"] = zipf(rng, words.PRAISE if good else words.BLAME)
    return fill(rng, form, bound)


def nearby_level(rng: random.Random, level: int, stray: float) -> int:
    """``level``, or with probability ``stray`` a neighbour of it."""
    moved = level + rng.choice((-1, 1)) if rng.random() < stray else level
    return min(max(moved, 0), LEVELS - 1)


def review(rng: random.Random, level: int, length: int = 2, stray: float = 0.2) -> str:
    """``length`` sentences at ``level`` (0 worst, 4 best); some stray to a neighbouring level."""
    subject = rng.choice(tuple(words.REVIEWED))
    forms = rng.sample(REVIEW_FORMS, length)
    return " ".join(review_sentence(rng, form, subject, nearby_level(rng, level, stray)) for form in forms)


@dataclass(frozen=True)
class StatementForm:
    """A premise with its claims."""

    premise: str
    claims: tuple[list[str], list[str], list[str]]
    """Claims that follow, that contradict, and that stay open."""


STATEMENT_FORMS = tuple(
    StatementForm(form["premise"], (form["follows"], form["contradicts"], form["open"])) for form in _TEMPLATES["statements"]
)


def statement_scene(rng: random.Random) -> dict[str, str]:
    """Words that a premise and its claims share."""
    pair = list(rng.choice(words.OPPOSITES[:30]))  # the pairs of adjectives
    rng.shuffle(pair)
    kind = rng.choice(tuple(KINDS))
    scene = {"quality": pair[0], "contrary": pair[1], "kind": kind, "noun": zipf(rng, KINDS[kind])}
    scene["thing"], scene["items"], scene["town"] = (zipf(rng, LEXICON[slot]) for slot in ("thing", "items", "town"))
    for slot in ("room", "color"):
        scene[slot], scene[f"{slot}2"] = rng.sample(LEXICON[slot], 2)
        scene[f"{slot}1"] = scene[slot]
    scene["person1"], scene["person2"], scene["person"] = people(rng, 3)
    return scene


def statement(rng: random.Random, answer: int) -> tuple[str, str]:
    """A premise, with its full stop, and a claim, without; ``answer`` indexes ``ANSWERS``."""
    form, scene = rng.choice(STATEMENT_FORMS), statement_scene(rng)
    return fill(rng, form.premise, scene), fill(rng, rng.choice(form.claims[answer]), scene)
