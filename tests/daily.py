"""What the default run leaves out by day, and ``-m slow`` takes: all but a random slice of each large grid of cases, and four
of five tests of those files that take longest (``in_turn``)."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Collection, Iterable
from datetime import date
from typing import Any

import pytest

DAY = os.environ.setdefault("L2L_TEST_DAY", str(date.today().toordinal()))
"""Seed of the slices. It is in the environment so that the processes of a run take the same ones, at midnight too."""
PERIOD = 5
"""Days in which each test has been in a default run."""


def daily_slice(
    cases: Iterable[Any], count: int, always: Collection[Any] = (), name: Callable[..., str] | None = None
) -> list[Any]:
    """The cases as parameters of a test; all but ``count`` of them, drawn by the date, are marked slow.

    Args:
        cases: a tuple holds several parameters.
        always: cases that every run takes besides.
        name: from a case's parameters to its id; None: the id that pytest makes.
    """
    cases = list(cases)
    rest = [n for n, case in enumerate(cases) if case not in always]
    default = set(random.Random(int(DAY)).sample(rest, min(count, len(rest))))
    found = []
    for n, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in always or n in default else pytest.mark.slow
        found.append(pytest.param(*values, marks=marks, id=name(*values) if name else None))
    return found


def is_due(test: str) -> bool:
    """Whether a test is in today's default run, as each is every fifth day. All cases of a test go together."""
    return (zlib.crc32(test.partition("[")[0].encode()) + int(DAY)) % PERIOD == 0
