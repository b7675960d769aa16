"""Made-up names, templates with slots that are filled by Zipf-distributed draws of words, and the texts that they make.

Names are composed of syllables by a fixed recipe: the same words in every process. A slot is written ``{town}``. Templates
(``templates.json``) have blanks before punctuation; :func:`tidy` closes them. The texts are reports, reviews, statements,
questions and scenes from people's lives.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from l2l.tasks.tiny_world import words

Value = TypeVar("Value")

_SLOT = re.compile(r"\{(\w+)\}")
_ONSETS = words.word_list("b br d dr f g gr h j k kl l m n p pr r s sh t th tr v w z")
_VOWELS = words.word_list("a e i o u ai ei or ar en")
_MIDDLES = words.word_list("b d g k l ll m n nn r rr s t v x")


def _coin(label: str, count: int, endings: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """``count`` fresh words; ``taken`` grows by them, so that no word has two meanings."""
    rng = random.Random(f"l2l small world {label}")
    coined: list[str] = []
    while len(coined) < count:
        word = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES) + rng.choice(endings)
        if word not in taken:
            taken.add(word)
            coined.append(word)
    return tuple(coined)


def _real_words(group: Any) -> set[str]:
    """All words in nested groups, and the names of the inner groups."""
    if isinstance(group, str):
        return {group}
    parts = (*group, *group.values()) if isinstance(group, dict) else group
    return set().union(*map(_real_words, parts))


_taken = _real_words(tuple(words.GROUPS.values()))
WOMEN = _coin("women", 280, ("a", "ia", "ela", "ine", "ira"), _taken)
MEN = _coin("men", 280, ("on", "us", "ek", "o", "ard"), _taken)
TOWNS = _coin("towns", 280, ("ton", "mouth", "burg", "ford", "ville"), _taken)
KINDS = {kind: real + _coin(kind, 85, ("im", "ot", "ul", "ap", "ern"), _taken) for kind, real in words.KINDS.items()}
"""Kinds of things: every kind begins with its common real nouns, rare made-up ones follow."""

_PLAIN = words.word_list("adjectives times rooms things counted colors numbers days praise blame")
LEXICON: dict[str, tuple[str, ...]] = {
    "woman": WOMEN,
    "man": MEN,
    "town": TOWNS,
    **{{"counted": "items"}.get(group, group.removesuffix("s")): words.GROUPS[group] for group in _PLAIN},
    **KINDS,
    **{f"{kind}_trait": traits for kind, traits in words.KIND_TRAITS.items()},
    **{f"{season}_sign": signs for season, signs in words.SEASONS.items()},
    **{f"{job}_work": things for job, things in words.JOBS.items()},
    **{f"{topic}_{role}": group for topic, roles in words.TOPICS.items() for role, group in roles.items()},
}
"""Slot name to words, the most frequent first."""


def zipf(rng: random.Random, ranked: Sequence[Value]) -> Value:
    """A draw whose frequency falls as one over the rank."""
    return ranked[min(int((len(ranked) + 1) ** rng.random()), len(ranked)) - 1]


def fill(rng: random.Random, template: str, bound: Mapping[str, str] | None = None) -> str:
    """The template with every ``{slot}`` filled: from ``bound``, else a Zipf draw from the slot's words.

    A digit at a slot's end tells two slots of one kind apart; a repeated slot keeps its word. ``{person}`` is a name.
    """
    known = dict(bound or {})
    out: list[str] = []
    for position, part in enumerate(_SLOT.split(template)):
        if position % 2 == 0:
            out.append(part)
            continue
        if part not in known:
            known[part] = _draw(rng, part.rstrip("0123456789"))
        out.append(known[part])
    return "".join(out)


def _draw(rng: random.Random, slot: str) -> str:
    if slot == "person":
        slot = "woman" if rng.random() < 0.5 else "man"
    return zipf(rng, LEXICON[slot])


def people(rng: random.Random, count: int) -> list[str]:
    """``count`` different names of either gender."""
    if rng.random() < 0.1:
        return rng.sample(WOMEN + MEN, count)
    found: list[str] = []
    while len(found) < count:
        name = _draw(rng, "person")
        if name not in found:
            found.append(name)
    return found


def tidy(text: str) -> str:
    """Text as people write it: no space before punctuation, ``an`` before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r" (?=[.,?!:;])", "", text))


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


class StatementForm(NamedTuple):
    """A premise with its claims: those that follow, that contradict, and that stay open."""

    premise: str
    claims: tuple[list[str], list[str], list[str]]


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
