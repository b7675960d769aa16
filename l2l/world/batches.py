"""Documents as token ids, cut into batches of about equal size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice

from l2l.world.corpus import documents
from l2l.world.tokens import BOS, EOS, PAD, split_words

Batch = list[list[int]]
"""Rows of token ids, right-padded to one length."""

_DOCUMENTS = 8192
"""Documents per chunk: sorted by length inside it, so that batches hold little padding."""
_SPELLED = 0.002
"""Share of words spelt letter by letter, so that the pieces for unknown words are trained."""


def encode(rng: random.Random, document: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Token ids of a document, with begin and end marks."""
    ids = [vocabulary[BOS]]
    for word in split_words(document):
        if rng.random() < _SPELLED and word.isalpha():
            ids += [vocabulary[word[0]], *(vocabulary[f"##{letter}"] for letter in word[1:])]
        else:
            ids.append(vocabulary[word])
    return [*ids, vocabulary[EOS]]


def chunk(seed: int, index: int, vocabulary: Mapping[str, int], tokens: int) -> list[Batch]:
    """The ``index``-th chunk of the corpus, in shuffled batches of at most ``tokens`` ids each, padding included."""
    rng = random.Random(f"l2l chunk {seed} {index}")
    rows = sorted((encode(rng, text, vocabulary) for text in islice(documents(seed, str(index)), _DOCUMENTS)), key=len)
    batches: list[Batch] = []
    while rows:
        longest = len(rows[min(len(rows), max(1, tokens // len(rows[0]))) - 1])
        taken = max(1, tokens // longest)
        batches.append(_pad(rows[:taken], vocabulary[PAD]))
        rows = rows[taken:]
    rng.shuffle(batches)
    return batches


def _pad(rows: list[list[int]], pad: int) -> Batch:
    width = max(map(len, rows))
    return [row + [pad] * (width - len(row)) for row in rows]


def stream(seed: int, vocabulary: Mapping[str, int], tokens: int, workers: int) -> Iterator[Batch]:
    """Batches without end, in an order that does not depend on ``workers`` (0: made in this process)."""
    if not workers:
        for index in count():
            yield from chunk(seed, index, vocabulary, tokens)
    with ProcessPoolExecutor(workers) as pool:
        ahead = [pool.submit(chunk, seed, index, vocabulary, tokens) for index in range(2 * workers)]
        for index in count(len(ahead)):
            ready = ahead.pop(0).result()
            ahead.append(pool.submit(chunk, seed, index, vocabulary, tokens))
            yield from ready
