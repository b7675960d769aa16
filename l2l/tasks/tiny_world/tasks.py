"""The 13 tasks of the tiny world. Rows are a pure function of (split, count, seed), balanced over labels.

Prompts ask in other words than pretraining tells, so that a task is not solved before it is learned.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any, Literal

from l2l.tasks.base import Example, GeneratedData, Row, Split, Task
from l2l.tasks.tiny_world import scenes, words
from l2l.tasks.tiny_world.scenes import KINDS, SORTS, fill, people, question, tidy

_VALIDATION_SHARE = 4
"""One text in this many belongs to validation."""

_CHOICES = 4
"""Options where each row has its own."""

_CATEGORIES = tuple(KINDS)
_TEMPLATES = words.TEMPLATES

Draw = Callable[[random.Random, int], dict[str, Any]]
"""Draws one row, without its label, whose correct option is the given index."""


def generate_rows(task: str, split: Split, count: int, seed: int, labels: int, draw: Draw) -> list[dict[str, Any]]:
    """``count`` rows of ``split``; every ``labels`` of them in a row hold each label once.

    A row belongs to a split by a checksum of its ``text``, so no text is in both splits, whatever the seed.

    Raises:
        ValueError: the split is neither ``train`` nor ``validation``.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; a world task has 'train' and 'validation'")
    rng = random.Random(f"{task} {split} {seed}")
    found: list[dict[str, Any]] = []
    order: list[int] = []
    while len(found) < count:
        order = order or rng.sample(range(labels), labels)
        label = order.pop()
        row = draw(rng, label)
        while (zlib.crc32(row["text"].encode()) % _VALIDATION_SHARE == 0) != (split == "validation"):
            row = draw(rng, label)
        found.append(row | {"label": label})
    return found


def _task(
    name: str,
    draw: Draw,
    prompt: str,
    options: tuple[str, ...] | str,
    columns: tuple[str, ...] = (),
    choices: int = 0,
    form: Literal["classification", "lm"] = "classification",
) -> Task:
    """A task of the tiny world.

    Args:
        prompt: with columns in braces.
        options: the options of every row, or the column that holds a row's own.
        columns: the columns of a row beside ``text`` and ``label``.
        choices: how many options a row has, where a column holds them.
    """

    def example(row: Row) -> Example:
        asked = prompt.format_map(row)
        texts = row[options] if isinstance(options, str) else options
        return Example(asked, tuple(f" {text}" for text in texts), (row["label"],))

    def generate(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
        return generate_rows(name, split, count, seed, choices or len(options), draw)

    return Task(name, GeneratedData(generate), ("text", *columns, "label"), example, form)


def _category(rng: random.Random, label: int) -> dict[str, Any]:
    """A sentence with a noun, mostly a made-up one whose kind was learned in pretraining."""
    noun = rng.choice(KINDS[_CATEGORIES[label]])
    return {"text": tidy(fill(rng, rng.choice(_TEMPLATES["category"]), {"noun": noun}))}


def _cause(rng: random.Random, label: int) -> dict[str, Any]:
    """A cause and two sentences of several tokens, one of which is its effect."""
    cause, effect, other = scenes.cause_scene(rng)
    effects = (effect, other) if label == 0 else (other, effect)
    return {"text": tidy(f"{cause} ."), "effects": [tidy(f"{text} .") for text in effects]}


def _entailment(rng: random.Random, label: int) -> dict[str, Any]:
    """A premise and a claim that follows (0), contradicts (1) or is open (2)."""
    premise, claim = scenes.statement(rng, label)
    return {"text": tidy(premise), "claim": tidy(claim)}


def _feeling(rng: random.Random, label: int) -> dict[str, Any]:
    """An event that leaves a feeling."""
    _, pronoun, event = scenes.feeling_scene(rng, scenes.FEELINGS[label])
    return {"text": tidy(event), "pronoun": pronoun}


def _job(rng: random.Random, label: int) -> dict[str, Any]:
    """What someone's work is about; asked is the workplace."""
    person = fill(rng, "{person}")
    return {"text": tidy(scenes.job_scene(rng, scenes.JOBS[label], person, length=1)), "person": person}


def _opposite(rng: random.Random, label: int) -> dict[str, Any]:
    """A beginning that asks for the opposite of its last word but one, and four words."""
    one, other = rng.sample(rng.choice(words.OPPOSITES), 2)
    others = [word for pair in words.OPPOSITES for word in pair if word not in (one, other)]
    choices = rng.sample(others, _CHOICES - 1)
    choices.insert(label, other)
    return {"text": tidy(f"{fill(rng, rng.choice(_TEMPLATES['opposite']))} not {one} but"), "choices": choices}


def _season(rng: random.Random, label: int) -> dict[str, Any]:
    """Signs of a season; the prompt asks for the weather that goes with it."""
    return {"text": tidy(scenes.season_scene(rng, scenes.SEASONS[label], length=1)), "person": fill(rng, "{person}")}


def _sentiment(rng: random.Random, label: int) -> dict[str, Any]:
    """A review that blames (0) or praises (1)."""
    return {"text": tidy(scenes.review(rng, rng.choice(((0, 1), (3, 4))[label]), length=2, stray=0.2))}


def _topic(rng: random.Random, label: int) -> dict[str, Any]:
    """A report on one of six topics, which are named by other words than in pretraining."""
    return {"text": tidy(scenes.report(rng, scenes.TOPICS[label], about=1, neutral=rng.randrange(2)))}


def _trait(rng: random.Random, label: int) -> dict[str, Any]:
    """Two traits of a kind of thing: feathers and a beak belong to a bird."""
    one, other = rng.sample(words.KIND_TRAITS[_CATEGORIES[label]], 2)
    return {"text": tidy(f"{fill(rng, rng.choice(_TEMPLATES['trait']))} it has {one} and {other} .")}


def _where(rng: random.Random, label: int) -> dict[str, Any]:
    """A story with two people, of whom one was seen at one of four places."""
    (who, other), places = people(rng, 2), rng.sample(words.ROOMS, _CHOICES)
    scene = {"who": who, "other": other, "place": places[label]}
    story = [fill(rng, rng.choice(forms), scene) for forms in (_TEMPLATES["placed"], _TEMPLATES["elsewhere"])]
    rng.shuffle(story)
    return {"text": tidy(" ".join(story)), "who": who, "places": places}


_WORKPLACES = tuple(words.WORKPLACES[job] for job in scenes.JOBS)
_TOPIC_WORDS = tuple(scenes.TOPIC_SYNONYMS[topic] for topic in scenes.TOPICS)
_LEVEL_WORDS = ("awful", "poor", "fair", "nice", "superb")

TASKS = (
    _task("world_category", _category, "{text} it must be some sort of", _CATEGORIES),
    _task("world_cause", _cause, "{text} what happened then?", "effects", ("effects",), choices=2),
    _task("world_entailment", _entailment, "{text} does it follow that {claim}? this is", scenes.ANSWERS, ("claim",)),
    _task("world_feeling", _feeling, "{text} {pronoun} was full of", ("joy", "sorrow", "rage", "fear"), ("pronoun",)),
    _task("world_job", _job, "{text} every morning {person} goes to the", _WORKPLACES, ("person",)),
    _task("world_opposite", _opposite, "{text}", "choices", ("choices",), choices=_CHOICES),
    _task("world_question", lambda rng, label: {"text": tidy(question(rng, SORTS[label]))}, "{text} the answer is", SORTS),
    _task("world_season", _season, "{text} {person} thought of", ("ice", "rain", "sun", "wind"), ("person",)),
    _task("world_sentiment", _sentiment, "{text} this is", ("awful", "nice")),
    # Reviews at five levels, 0 the worst.
    _task(
        "world_stars",
        lambda rng, label: {"text": tidy(scenes.review(rng, label, 2, stray=0.15))},
        "{text} summary:",
        _LEVEL_WORDS,
    ),
    _task("world_topic", _topic, "{text} these words belong to the world of", _TOPIC_WORDS),
    _task("world_trait", _trait, "{text} it must be some sort of", _CATEGORIES),
    _task(
        "world_where",
        _where,
        "{text} we saw {who} in the",
        "places",
        ("who", "places"),
        choices=_CHOICES,
        form="lm",  # question answering: the answer's token is the loss
    ),
)
