"""The pretraining corpus of the embedded model: an endless, seeded mixture of 15 families of texts of the tiny world.

Each function named after a family returns one text of it, untidied (blanks before punctuation).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from l2l.tasks.tiny_world import words
from l2l.tasks.tiny_world.scenes import (
    ANSWERS,
    FEELINGS,
    JOBS,
    KINDS,
    LEVELS,
    LEXICON,
    MEN,
    REVIEW_FORMS,
    SEASONS,
    SORTS,
    STATEMENT_FORMS,
    TOPIC_SYNONYMS,
    TOPICS,
    WOMEN,
    StatementForm,
    cause_scene,
    feeling_scene,
    fill,
    job_scene,
    nearby_level,
    people,
    question,
    report,
    review_sentence,
    season_scene,
    statement_scene,
    tidy,
    zipf,
)

_REPORT_CUES = (
    "this report is about {topic} .",
    "topic : {topic} .",
    "{person} likes news about {topic} .",
    "it was on the {topic} page of the paper .",
)


def reports(rng: random.Random) -> str:
    """A report, mostly followed by a sentence that names its topic."""
    topic = rng.choice(TOPICS)
    text = report(rng, topic, rng.choice((1, 2, 2, 3)), rng.choice((0, 0, 1)), rng.choice((0, 0, 0, 1)))
    return f"{text} {fill(rng, rng.choice(_REPORT_CUES), {'topic': topic})}" if rng.random() < 0.6 else text


_VERDICTS = (
    "in all the {subject} was {quality} .",
    "{person} gives it {stars} stars .",
    "{person} calls it {quality} .",
    "so the {subject} gets {stars} of five points .",
    "{person} {opinion} the {subject} .",
)


def reviews(rng: random.Random) -> str:
    """A review with its opening and, mostly, a verdict."""
    level, subject = rng.randrange(LEVELS), rng.choice(tuple(words.REVIEWED))
    parts = [fill(rng, "{person} wrote about the {subject} .", {"subject": subject})] if rng.random() < 0.3 else []
    for form in rng.sample(REVIEW_FORMS, rng.choice((1, 2, 2, 3))):
        parts.append(review_sentence(rng, form, subject, nearby_level(rng, level, 0.15)))
    if rng.random() < 0.7:
        parts.append(review_sentence(rng, rng.choice(_VERDICTS), subject, level))
    return " ".join(parts)


_STATEMENT_CUES = (
    "is it true that {claim} ? {answer} .",
    "can we say that {claim} ? {answer} .",
    "{claim} ? {answer} .",
    "{claim} : {verdict} .",
)
_TRUTH = {"yes": "true", "no": "false", "maybe": "unknown"}


def _judged(rng: random.Random, form: StatementForm, scene: dict[str, str]) -> str:
    answer = rng.randrange(len(ANSWERS))
    claim = fill(rng, rng.choice(form.claims[answer]), scene)
    bound = {"claim": claim, "answer": ANSWERS[answer], "verdict": _TRUTH[ANSWERS[answer]]}
    return fill(rng, rng.choice(_STATEMENT_CUES), bound)


def statements(rng: random.Random) -> str:
    """A premise with one or two claims and what becomes of them."""
    form, scene = rng.choice(STATEMENT_FORMS), statement_scene(rng)
    claims = (_judged(rng, form, scene) for _ in range(rng.choice((1, 2, 2))))
    return " ".join((fill(rng, form.premise, scene), *claims))


_COUNT_OPENINGS = (
    "{first} has {amount} {items} . {second} has {amount2} {items} .",
    "{first} found {amount} {items} and {second} found {amount2} {items} .",
    "{first} owns {amount} {items} , {second} owns {amount2} .",
)
_COUNT_RESULTS = (
    "{more} has more {items} than {less} .",
    "who has more {items} ? {more} .",
    "{less} has fewer {items} than {more} .",
    "who has fewer {items} ? {less} .",
    "who has the most {items} ? {more} .",
    "who is richer in {items} ? {more} .",
)


def counting(rng: random.Random) -> str:
    """Amounts of one item that two people have and some comparisons, or a plain order of two amounts."""
    if rng.random() < 0.1:
        return f"{rng.choice(words.LARGE_AMOUNTS)} is more than {rng.choice(words.SMALL_AMOUNTS)} ."
    more, less = people(rng, 2)
    holdings = [(more, rng.choice(words.LARGE_AMOUNTS)), (less, rng.choice(words.SMALL_AMOUNTS))]
    rng.shuffle(holdings)
    (first, amount), (second, amount2) = holdings
    scene = {"first": first, "amount": amount, "second": second, "amount2": amount2}
    scene |= {"more": more, "less": less, "items": zipf(rng, LEXICON["items"])}
    results = " ".join(fill(rng, form, scene) for form in rng.sample(_COUNT_RESULTS, rng.choice((1, 2, 3))))
    return f"{fill(rng, rng.choice(_COUNT_OPENINGS), scene)} {results}"


_MOVES = (
    "{who} went to the {room} .",
    "{who} is in the {room} .",
    "{who} walked into the {room} .",
    "{who} stayed in the {room} .",
)
_PLACE_QUESTIONS = (
    "where is {who} ? in the {room} .",
    "{who} is in the {room} .",
    "where can we find {who} ? in the {room} .",
    "so {who} is in the {room} now .",
)


def whereabouts(rng: random.Random) -> str:
    """Two or three people, each in a room of their own, and where some of them are."""
    count = rng.choice((2, 2, 3))
    who, rooms = people(rng, count), rng.sample(words.ROOMS, len(words.ROOMS))
    placed = dict(zip(who, rooms, strict=False))
    story = " ".join(fill(rng, rng.choice(_MOVES), {"who": person, "room": room}) for person, room in placed.items())
    asked = rng.sample(list(placed), rng.randint(1, len(placed)))
    answers = (fill(rng, rng.choice(_PLACE_QUESTIONS), {"who": person, "room": placed[person]}) for person in asked)
    return " ".join((story, *answers))


_LINKS = ("thanked", "met", "called", "visited", "helped", "saw", "greeted", "phoned", "warned", "followed")
_REASONS = (
    "was ill",
    "was tired",
    "had won a prize",
    "was leaving {town}",
    "had lost a {thing}",
    "was kind",
    "had time",
    "knew the way",
    "had a {thing}",
    "was alone",
    "was in {town}",
    "sold a {thing}",
    "was hungry",
    "had a new {thing}",
)
_PRONOUN_ANSWERS = (
    "who {reason} ? {name} .",
    "so {name} {reason} .",
    "it was {name} who {reason} .",
)


def pronouns(rng: random.Random) -> str:
    """A woman, a man and a pronoun whose gender tells who is meant, and who was; or someone's gender."""
    woman, man = zipf(rng, WOMEN), zipf(rng, MEN)
    first, second = rng.sample([woman, man], 2)
    name, pronoun = (woman, "she") if rng.random() < 0.5 else (man, "he")
    reason = fill(rng, rng.choice(_REASONS))
    sentence = f"{first} {rng.choice(_LINKS)} {second} because {pronoun} {reason} ."
    if rng.random() < 0.15:
        return f"{name} is a {'woman' if pronoun == 'she' else 'man'} ."
    return f"{sentence} {fill(rng, rng.choice(_PRONOUN_ANSWERS), {'reason': reason, 'name': name})}"


_USES: dict[str, tuple[str, ...]] = {
    "animal": (
        "the {animal} slept in the {room} .",
        "{person} fed the {animal} {time} .",
        "a {animal} ran across the road .",
    ),
    "bird": ("the {bird} flew over {town} .", "a {bird} sat in its nest .", "{person} heard the {bird} whistle ."),
    "plant": (
        "{person} watered the {plant} .",
        "a {plant} grew behind the {room} .",
        "the {plant} needs rain and light .",
    ),
    "tool": (
        "{person} repaired the fence with a {tool} .",
        "the {tool} hung on a nail .",
        "{person} worked with the {tool} .",
    ),
    "food": (
        "{person} ate {food} for supper .",
        "we cooked the {food} with salt .",
        "{person} tasted the {food} {time} .",
    ),
    "garment": (
        "{person} wore a {color} {garment} .",
        "the {garment} was too tight .",
        "{person} washed the {garment} .",
    ),
}
_TRAITS = "the {noun} has {trait} ."


def _use(rng: random.Random, kind: str, noun: str) -> str:
    """A sentence on how ``noun`` is used, or a trait of its kind."""
    return fill(rng, rng.choice((*_USES[kind], _TRAITS.replace("trait", f"{kind}_trait"))), {kind: noun, "noun": noun})


def _word_list(rng: random.Random, kind: str) -> str:
    first, second, third = (zipf(rng, KINDS[kind]) for _ in range(3))
    if rng.random() < 0.5:
        return f"{first} , {second} and {third} are {kind} words ."
    stray = zipf(rng, KINDS[rng.choice([other for other in KINDS if other != kind])])
    order = rng.sample([first, second, stray], 3)
    return f"{order[0]} , {order[1]} , {order[2]} . the odd one is {stray} ."


def kinds(rng: random.Random) -> str:
    """A definition, a use, or a list."""
    kind = rng.choice(tuple(KINDS))
    noun, draw = zipf(rng, KINDS[kind]), rng.random()
    if draw < 0.2:
        return _word_list(rng, kind)
    parts = [_use(rng, kind, noun)]
    if draw < 0.75:
        form = rng.choice(("a {noun} is a {kind} .", "the {noun} is a {kind} .", "what is a {noun} ? a {kind} ."))
        parts.insert(rng.randrange(2), fill(rng, form, {"noun": noun, "kind": kind}))
    return " ".join(parts)


_JOINTS = (
    "{cause} , so {effect} .",
    "{effect} because {cause} .",
    "{cause} . as a result {effect} .",
    "why ? because {cause} . {effect} .",
    "first {cause} , then {effect} .",
)


def causes(rng: random.Random) -> str:
    """A cause joined to its effect."""
    cause, effect, _ = cause_scene(rng)
    return fill(rng, rng.choice(_JOINTS), {"cause": cause, "effect": effect})


_SORT_ANSWERS: dict[str, tuple[str, ...]] = {
    "person": ("{person2} .", "it was {person2} ."),
    "place": ("in {town2} .", "in the {room2} ."),
    "number": ("{number} .", "about {number} ."),
    "day": ("on {day} .", "it was {day} ."),
    "reason": ("because it rained .", "because of a letter ."),
}
_SORT_CUES = ("this asks for a {sort} .", "the answer is a {sort} .", "we need a {sort} here .")


def questions(rng: random.Random) -> str:
    """A question with its answer, with the sort of its answer, or with both."""
    sort = rng.choice(SORTS)
    parts = [question(rng, sort)]
    if rng.random() < 0.6:
        parts.append(fill(rng, rng.choice(_SORT_ANSWERS[sort])))
    if rng.random() < 0.5:
        parts.append(fill(rng, rng.choice(_SORT_CUES), {"sort": sort}))
    return " ".join(parts)


_SEASON_CUES = (
    "it is {season} .",
    "it was {season} in {town} .",
    "the {season} has come .",
    "{person} loves the {season} .",
    "it is {month} , the {season} is here .",
    "it was a day in {month} .",
)


def seasons(rng: random.Random) -> str:
    """Signs of a season and its name, or a month and its season."""
    season = rng.choice(SEASONS)
    bound = {"season": season, "month": rng.choice(words.MONTHS[season])}
    if rng.random() < 0.15:
        return fill(rng, "{month} is a month of {season} .", bound)
    return f"{season_scene(rng, season, rng.choice((1, 1, 2)))} {fill(rng, rng.choice(_SEASON_CUES), bound)}"


_FEELING_CUES = (
    "{pronoun} felt {feeling} .",
    "{pronoun} was {feeling} .",
    "{pronoun} {sign} .",
    "how did {name} feel ? {feeling} .",
)
_SIGNS = {
    "happy": "smiled cheered danced laughed",
    "sad": "wept sighed mourned sobbed",
    "angry": "shouted stamped cursed scolded",
    "afraid": "trembled fled screamed shivered",
}
_NAMES = {
    "happy": "happy delighted glad",
    "sad": "sad gloomy unhappy",
    "angry": "angry furious cross",
    "afraid": "afraid terrified scared",
}
_NOUNS = {"happy": "joy", "sad": "sorrow", "angry": "rage", "afraid": "fear"}


def feelings(rng: random.Random) -> str:
    """An event and the feeling after it."""
    feeling = rng.choice(FEELINGS)
    name, pronoun, event = feeling_scene(rng, feeling)
    bound = {"name": name, "pronoun": pronoun, "sign": zipf(rng, _SIGNS[feeling].split())}
    bound["feeling"] = zipf(rng, _NAMES[feeling].split())
    parts = [event, fill(rng, rng.choice(_FEELING_CUES), bound)]
    if rng.random() < 0.2:
        parts.append(f"it was {_NOUNS[feeling]} .")
    return " ".join(parts)


_JOB_CUES = ("{person} is a {job} .", "what is {person} ? a {job} .", "{person} works as a {job} in {town} .")
_PLACES = "every {job} is often at the {place} ."


def jobs(rng: random.Random) -> str:
    """Someone's work, with the name of the job before or after."""
    job, person = rng.choice(JOBS), fill(rng, "{person}")
    parts = [
        job_scene(rng, job, person, rng.choice((1, 1, 2))),
        fill(rng, rng.choice(_JOB_CUES), {"person": person, "job": job}),
    ]
    if rng.random() < 0.1:
        return fill(rng, _PLACES, {"job": job, "place": words.WORKPLACES[job]})
    if rng.random() < 0.3:
        parts.reverse()
    return " ".join(parts)


_OPPOSITE_FORMS = (
    "the opposite of {one} is {other} .",
    "{one} and {other} are opposites .",
    "it is not {one} , it is {other} .",
    "{person} said {one} , {person2} said {other} .",
    "is it {one} or {other} ? {person} says {other} .",
)


def opposites(rng: random.Random) -> str:
    """A sentence with both words of a pair, the commoner pairs more often."""
    one, other = zipf(rng, words.OPPOSITES)
    if rng.random() >= 0.5:
        one, other = other, one
    return fill(rng, rng.choice(_OPPOSITE_FORMS), {"one": one, "other": other})


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
        return feeling_scene(rng, rng.choice(FEELINGS))[2]
    if draw == 1:
        return job_scene(rng, rng.choice(JOBS), fill(rng, "{person}"), 1)
    if draw == 2:
        return report(rng, rng.choice(TOPICS), 1)
    if draw == 3:
        return season_scene(rng, rng.choice(SEASONS), 1)
    kind = rng.choice(tuple(KINDS))
    return _use(rng, kind, fill(rng, f"{{{kind}}}"))


def stories(rng: random.Random) -> str:
    """Opening, middle and closing."""
    parts = [fill(rng, rng.choice(_OPENINGS)), _middle(rng)]
    if rng.random() < 0.6:
        parts.append(fill(rng, rng.choice(_CLOSINGS), {"mood": rng.choice(_MOODS)}))
    return " ".join(parts)


_SORT_SYNONYMS = {"person": "people", "place": "towns", "number": "numbers", "day": "days", "reason": "reasons"}
"""Another word for each sort of answer."""
_FRAMES = (
    "these words belong to the world of {word} .",
    "it must be some sort of {kind} .",
    "they said it was {quality} .",
    "summary : {quality} .",
    "does it follow that {person} is ill ? this is {answer} .",
    "{person} asked about a {thing} , the answer is {answer} .",
    "{person} guessed that it was {month} .",
    "this is a question of {sort} .",
    "{person} showed a {thing} to {person2} .",
    "now where is {person} then ?",
    "and who has more then ? {person} .",
    "every morning {person} goes to the {place} .",
    "what happened then ? {person} came home .",
    "{person} thought of it on {day} .",
    "{person} counted the {items} .",
    "{person} was full of {mood} .",
    "not {one} but {other} .",
)


def _bound(rng: random.Random) -> dict[str, str]:
    one, other = zipf(rng, words.OPPOSITES)[0], zipf(rng, words.OPPOSITES)[1]
    return {
        "word": rng.choice(tuple(TOPIC_SYNONYMS.values())),
        "kind": rng.choice(tuple(words.KINDS)),
        "quality": zipf(rng, rng.choice(words.LEVELS)),
        "answer": rng.choice(("right", "wrong", "open")),
        "month": rng.choice([month for months in words.MONTHS.values() for month in months]),
        "sort": rng.choice(tuple(_SORT_SYNONYMS.values())),
        "place": rng.choice(tuple(words.WORKPLACES.values())),
        "mood": rng.choice(("joy", "sorrow", "rage", "fear")),
        "one": one,
        "other": other,
    }


def phrases(rng: random.Random) -> str:
    """A topic's other word beside a report on it, or a phrase whose blank is filled at random."""
    if rng.random() < 0.4:
        topic = rng.choice(TOPICS)
        return f"{report(rng, topic, 1)} {fill(rng, '{person} often talks of {word} .', {'word': TOPIC_SYNONYMS[topic]})}"
    return fill(rng, rng.choice(_FRAMES), _bound(rng))


SHARES: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (reports, 6),
    (reviews, 6),
    (statements, 8),
    (counting, 7),
    (whereabouts, 7),
    (pronouns, 7),
    (kinds, 6),
    (causes, 4),
    (questions, 4),
    (seasons, 4),
    (feelings, 4),
    (jobs, 4),
    (opposites, 2),
    (stories, 6),
    (phrases, 2),
)
"""Families with their share of the texts."""

_JOINED = 0.15
"""Share of documents made of several texts."""


def documents(seed: int, shard: str = "train") -> Iterator[str]:
    """Documents without end: one text each, now and then two to four. The same arguments give the same documents."""
    rng = random.Random(f"l2l corpus {shard} {seed}")
    families = [family for family, _ in SHARES]
    weights = [share for _, share in SHARES]
    while True:
        count = rng.randint(2, 4) if rng.random() < _JOINED else 1
        yield tidy(" ".join(family(rng) for family in rng.choices(families, weights, k=count)))
