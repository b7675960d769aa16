"""Large grids of cases: the default run takes a random slice of each, another one every day, ``-m slow`` the rest."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterable
from datetime import date
from typing import Any

import pytest

DAY = os.environ.setdefault("L2L_TEST_DAY", str(date.today().toordinal()))
"""Seed of the slices. It is in the environment so that the processes of a run take the same ones, at midnight too."""


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
