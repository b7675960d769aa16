"""A grid of cases of which the default run takes a random slice, another one every day; the rest are slow tests."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Sequence
from datetime import date
from typing import Any

import pytest

DAY = os.environ.setdefault("L2L_TEST_DAY", str(date.today().toordinal()))
"""Seed of the slices. It is in the environment so that processes that share a run take the same ones."""


def sliced(
    cases: Sequence[Any], count: int, always: Collection[Any] = (), name: Callable[[Any], str] = str
) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: all cases, those outside the slice marked as slow.

    Args:
        count: size of the slice.
        always: cases that the default run takes besides.
        name: gives a case its id.
    """
    rest = [index for index, case in enumerate(cases) if case not in always]
    drawn = set(random.Random(int(DAY)).sample(rest, min(count, len(rest))))
    return [
        pytest.param(case, id=name(case), marks=() if case in always or index in drawn else pytest.mark.slow)
        for index, case in enumerate(cases)
    ]
