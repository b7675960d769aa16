"""What is told in the tiny world: reports, reviews, statements, questions and scenes from people's lives.

Templates have blanks before punctuation; :func:`l2l.tasks.tiny_world.grammar.tidy` closes them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from l2l.tasks.tiny_world import words
from l2l.tasks.tiny_world.grammar import KINDS, LEXICON, MEN, WOMEN, fill, people, zipf

# Causes and effects.

_EFFECTS = (
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


def cause_scene(rng: random.Random) -> tuple[str, str, str]:
    """A cause, its effect, and the effect of another cause, all in the same names; without full stops."""
    (cause, effect), (_, other) = rng.sample(_EFFECTS, 2)
    person, person2 = people(rng, 2)
    bound = {"person": person, "person2": person2, "thing": zipf(rng, words.THINGS), "room": rng.choice(words.ROOMS)}
    bound["color"] = zipf(rng, words.COLORS)
    return fill(rng, cause, bound), fill(rng, effect, bound), fill(rng, other, bound)


# Events and the feelings that they leave.

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


def feeling_scene(rng: random.Random, feeling: str) -> tuple[str, str, str]:
    """Name, pronoun, and a sentence of what happened."""
    name, pronoun = (zipf(rng, WOMEN), "she") if rng.random() < 0.5 else (zipf(rng, MEN), "he")
    return name, pronoun, f"{name} {fill(rng, rng.choice(_EVENTS[feeling]))} ."


# Jobs and seasons, told by the words that go with them.

JOBS = tuple(words.JOBS)
_JOB_FORMS = (
    "{person} knows a lot about {work} .",
    "all day {person} has to do with {work} and {work2} .",
    "{person} spoke about the {work} .",
    "{person} comes home from the {work} .",
    "{person} dreams of {work} .",
)
SEASONS = tuple(words.SEASONS)
_SEASON_FORMS = (
    "{person} saw {sign} in {town} .",
    "there was {sign} near the {room} .",
    "the children talked about {sign} .",
    "{person} dreamed of {sign} .",
    "{sign} and more {sign2} in {town} .",
)


def job_scene(rng: random.Random, job: str, person: str, length: int) -> str:
    """``length`` sentences on what ``person`` works with."""
    forms = (form.replace("{work", f"{{{job}_work") for form in rng.sample(_JOB_FORMS, length))
    return " ".join(fill(rng, form, {"person": person}) for form in forms)


def season_scene(rng: random.Random, season: str, length: int) -> str:
    """``length`` sentences with signs of the season."""
    forms = (form.replace("{sign", f"{{{season}_sign") for form in rng.sample(_SEASON_FORMS, length))
    return " ".join(fill(rng, form) for form in forms)


# Questions, and the sort of answer that each asks for.

SORTS = ("person", "place", "number", "day", "reason")
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "person": (
        "who found the {thing} ?",
        "which man met {person} ?",
        "what woman lives in {town} ?",
        "who is the friend of {person} ?",
        "who left the {room} ?",
        "whose {thing} is in the {room} ?",
    ),
    "place": (
        "where is the {thing} ?",
        "which town does {person} like ?",
        "where did {person} go ?",
        "in which room is {person} ?",
        "what town has {color} roofs ?",
        "where do the {items} come from ?",
    ),
    "number": (
        "how many {items} does {person} have ?",
        "how old is {person} ?",
        "how far is {town} ?",
        "what does the {thing} cost ?",
        "how many people live in {town} ?",
        "how often does {person} sing ?",
    ),
    "day": (
        "when did {person} leave {town} ?",
        "on which day was the feast ?",
        "when is the wedding of {person} ?",
        "what day did {person} choose ?",
        "when does the {room} open ?",
        "since when is {person} ill ?",
    ),
    "reason": (
        "why did {person} leave ?",
        "for what reason is {person} sad ?",
        "why is the {thing} {color} ?",
        "what made {person} angry ?",
        "why does nobody like {town} ?",
        "how come {person} is late ?",
    ),
}


def question(rng: random.Random, sort: str) -> str:
    """A question that asks for ``sort``, with its question mark."""
    return fill(rng, rng.choice(_QUESTIONS[sort]))


# News of six topics: only the words tell which.

TOPICS = tuple(words.TOPICS)
TOPIC_SYNONYMS = {
    "sport": "games",
    "cooking": "meals",
    "music": "songs",
    "science": "research",
    "trade": "money",
    "crime": "thieves",
}
"""Another word for each topic, which a task asks for; only a few texts of pretraining tell that it means the topic."""
_REPORT_FORMS = (
    "the {adjective} {who} {did} the {what} .",
    "{person} the {who} {did} a {what} {time} .",
    "a {what} was seen at the {where} in {town} .",
    "people in {town} spoke about the {how} {who} .",
    "the {where} was full of people because of the {what} .",
    "{person} left the {where} with a {what} .",
    "a {who} from {town} {did} the {how} {what} {time} .",
    "{person} hopes to be a {who} .",
)
_TOPIC_FORMS = {
    topic: tuple(re.sub(r"\{(who|did|what|where|how)\}", rf"{{{topic}_\1}}", form) for form in _REPORT_FORMS)
    for topic in TOPICS
}
_NEUTRAL_FORMS = (
    "{person} was there on {day} .",
    "it was {day} in {town} .",
    "the {adjective} man met {person} {time} .",
    "many people of {town} heard of it .",
    "{person} said nothing about it .",
    "a {adjective} woman came from {town} .",
)


def report(rng: random.Random, topic: str, about: int, neutral: int = 0, other: int = 0) -> str:
    """A report with so many sentences about ``topic``, without any topic, and about one other topic, shuffled."""
    stray = rng.choice([name for name in TOPICS if name != topic])
    # Each form on the topic is "sampled" from itself, a draw that has to stay: the corpus and all rows depend on it.
    parts = [fill(rng, rng.sample([form], 1)[0]) for form in rng.sample(_TOPIC_FORMS[topic], about)]
    parts += [fill(rng, form) for form in rng.sample(_NEUTRAL_FORMS, neutral)]
    parts += [fill(rng, form) for form in rng.sample(_TOPIC_FORMS[stray], other)]
    rng.shuffle(parts)
    return " ".join(parts)


# Reviews at five levels of praise.

LEVELS = len(words.LEVELS)
REVIEW_FORMS = (
    "the {part} was {quality} .",
    "{person} found the {part} {quality} .",
    "we saw a {quality} {part} .",
    "what a {quality} {part} !",
    "the {part} looked {quality} to {person} .",
    "a {quality} {subject} with a {quality2} {part} .",
)


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


# A premise and a claim that follows from it, contradicts it, or is left open by it.

ANSWERS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class StatementForm:
    """A premise with its claims."""

    premise: str
    claims: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    """Claims that follow, that contradict, and that stay open."""


STATEMENT_FORMS = (
    StatementForm(
        "the {thing} in the {room} is {quality} .",
        (
            ("the {thing} is {quality}", "the {thing} is not {contrary}"),
            ("the {thing} is {contrary}", "the {thing} is not {quality}"),
            ("the {thing} is {color}", "{person} likes the {thing}"),
        ),
    ),
    StatementForm(
        "{person1} gave the {thing} to {person2} .",
        (
            ("{person2} has the {thing}", "{person2} got the {thing}"),
            ("{person1} has the {thing}", "{person1} kept the {thing}"),
            ("{person2} likes the {thing}", "the {thing} is {color}"),
        ),
    ),
    StatementForm(
        "{person1} bought a {noun} in {town} .",
        (
            ("{person1} bought a {kind}", "{person1} was in {town}"),
            ("{person1} bought nothing", "{person1} was never in {town}"),
            ("{person1} bought a {color} {kind}", "{person1} likes {town}"),
        ),
    ),
    StatementForm(
        "{person1} is in the {room1} .",
        (
            ("{person1} is not in the {room2}", "the {room1} is not empty"),
            ("{person1} is in the {room2}", "the {room1} is empty"),
            ("{person1} is {adjective}", "{person2} is in the {room1}"),
        ),
    ),
    StatementForm(
        "all the {items} in {town} are {color1} .",
        (
            ("some {items} in {town} are {color1}", "{town} has {color1} {items}"),
            ("no {items} in {town} are {color1}", "some {items} in {town} are {color2}"),
            ("all the {items} are {color1}", "{person1} likes the {items}"),
        ),
    ),
    StatementForm(
        "{person1} is {quality} and {person2} is {contrary} .",
        (
            ("{person1} is not {contrary}", "{person2} is {contrary}"),
            ("{person1} is {contrary}", "{person2} is {quality}"),
            ("{person1} likes {person2}", "{person2} is {adjective}"),
        ),
    ),
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
