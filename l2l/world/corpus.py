"""The pretraining corpus: an endless, seeded mixture of the families of texts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from l2l.world.grammar import tidy
from l2l.world.texts import (
    causes,
    counting,
    feelings,
    jobs,
    kinds,
    opposites,
    phrases,
    pronouns,
    questions,
    reports,
    reviews,
    seasons,
    statements,
    stories,
    whereabouts,
)

SHARES = (
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
        yield tidy(" ".join(family.document(rng) for family in rng.choices(families, weights, k=count)))
