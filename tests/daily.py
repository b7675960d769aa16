"""Large grids of cases: the default run takes a random slice of each, another one every day, ``-m slow`` the rest."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterable
from typing import Any

import pytest


def daily_slice(cases: Iterable[Any], count: int) -> list[Any]:
    """The cases as parameters of a test; all but ``count`` of them, drawn by the date, are marked slow."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    today = random.Random(datetime.date.today().toordinal()).sample(range(len(cases)), count)
    return [pytest.param(*case, marks=() if n in today else pytest.mark.slow) for n, case in enumerate(cases)]
