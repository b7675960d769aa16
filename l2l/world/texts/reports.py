"""News of six topics: only the words tell which."""

from __future__ import annotations

import random
import re

from l2l.world import words
from l2l.world.grammar import LEXICON, fill, sentences

TOPICS = tuple(words.TOPICS)
_FORMS = (
    "the {adjective} {who} {did} the {what} .",
    "{person} the {who} {did} a {what} {time} .",
    "a {what} was seen at the {where} in {town} .",
    "people in {town} spoke about the {how} {who} .",
    "the {where} was full of people because of the {what} .",
    "{person} left the {where} with a {what} .",
    "a {who} from {town} {did} the {how} {what} {time} .",
    "{person} hopes to be a {who} .",
)
_NEUTRAL = (
    "{person} was there on {day} .",
    "it was {day} in {town} .",
    "the {adjective} man met {person} {time} .",
    "many people of {town} heard of it .",
    "{person} said nothing about it .",
    "a {adjective} woman came from {town} .",
)
_CUES = (
    "this report is about {topic} .",
    "topic : {topic} .",
    "{person} likes news about {topic} .",
    "it was on the {topic} page of the paper .",
)

LEXICON.update({f"{topic}_{role}": group for topic, roles in words.TOPICS.items() for role, group in roles.items()})
FORMS = {
    topic: tuple(re.sub(r"\{(who|did|what|where|how)\}", rf"{{{topic}_\1}}", form) for form in _FORMS)
    for topic in TOPICS
}


def report(rng: random.Random, topic: str, about: int, neutral: int = 0, other: int = 0) -> str:
    """A report with so many sentences about ``topic``, without any topic, and about one other topic, shuffled."""
    stray = rng.choice([name for name in TOPICS if name != topic])
    parts = [sentences(rng, [form], 1) for form in rng.sample(FORMS[topic], about)]
    parts += [fill(rng, form) for form in rng.sample(_NEUTRAL, neutral)]
    parts += [fill(rng, form) for form in rng.sample(FORMS[stray], other)]
    rng.shuffle(parts)
    return " ".join(parts)


def document(rng: random.Random) -> str:
    """A report, mostly followed by a sentence that names its topic."""
    topic = rng.choice(TOPICS)
    text = report(rng, topic, rng.choice((1, 2, 2, 3)), rng.choice((0, 0, 1)), rng.choice((0, 0, 0, 1)))
    return f"{text} {fill(rng, rng.choice(_CUES), {'topic': topic})}" if rng.random() < 0.6 else text
