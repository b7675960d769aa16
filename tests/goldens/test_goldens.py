"""Results are those that were recorded: to the bit on the machine type that recorded them, and near them on others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_runs import COMMANDS, PRINTED, RECORDED, RECORDINGS, Result, machine, printed_config, printed_path

NEAR = 5e-3
"""Of the largest value of a list, how far a number may be off on another machine. Kernels round a loss by some 1e-7 of it,
which a central difference with epsilon 1e-3 makes 1e-4 of a projected gradient, and some steps add up. Recorded anew with
kernels for SSE4 and for AVX2, all lists but those of :data:`ROUGH` were within 1.6e-3. A changed method is off by percents.
"""
ROUGH: dict[tuple[str, str, str], float | None] = {
    # The loss's second difference, which divides rounding by epsilon squared; the learning rate made of it. 0.0024 apart.
    ("fine_tune", "lr=auto", ""): 2e-2,
    # Steps divided by the root of a second difference: 0.011 apart.
    ("weights", "hizoo", ""): 5e-2,
    # The forward in bfloat16 rounds by about as much as the losses differ; bits only. 0.73 apart.
    ("weights", "bfloat16", ""): None,
    # Losses of a forward in bfloat16 have three digits: 0.06 apart; their difference is noise, and is held to its bits only.
    ("fine_tune", "bfloat16", ""): 0.2,
    ("fine_tune", "bfloat16", "projected_gradient"): None,
    # One of eight rows, where its two best options are nearly alike.
    ("experiments", "", "accuracy"): 0.4,
}
"""Wider limits by file, part of the result's name, part of the list's name; None: finite is enough. The last to fit holds."""

SLOW = {
    *(("fine_tune", name) for name in ("mezo functional cosine", "mezo bfloat16", "learned lr=auto", "momentum")),
    *(("fine_tune", name) for name in ("learned+lozo", "blockwise+mezo", "tezo", "svrg", "sign", "adam", "subzero")),
    ("meta_train", "ratio"),
    ("experiments", "meta-evaluate"),
    ("experiments", "compare"),
}
"""Runs of about a second and more whose methods are held to their bits by ``weights`` in the default run anyway."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def limit(file: str, key: str, column: str) -> float | None:
    found: float | None = NEAR
    for (in_file, in_key, in_column), value in ROUGH.items():
        if in_file == file and in_key in key and in_column in column:
            found = value
    return found


def far(file: str, key: str, found: Result, wanted: Result) -> list[str]:
    """The lists of numbers that are not near the recorded ones."""
    wrong = []
    for column, values in wanted["numbers"].items():
        most, now = limit(file, key, column), found["numbers"][column]
        scale = max(map(abs, values), default=0.0)
        near = all(map(math.isfinite, now)) and (
            most is None or all(abs(a - b) <= most * scale for a, b in zip(values, now, strict=False))
        )
        if len(values) != len(now) or not near:
            wrong.append(f"{column}: recorded {values}, found {now}")
    return wrong


def cases() -> list[Any]:
    names = [(file, key) for file, entries in RECORDINGS.items() for key in entries]
    slow = pytest.mark.slow
    return [pytest.param(*name, id="-".join(name), marks=slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize(("file", "key"), cases())
def test_a_result_is_the_recorded_one(file: str, key: str, tmp_path: Path):
    found, wanted = RECORDINGS[file][key](tmp_path / "out"), recorded(file)["results"][key]
    assert found.get("exact") == wanted.get("exact")
    assert found["numbers"].keys() == wanted["numbers"].keys()
    assert far(file, key, found, wanted) == []
    if recorded(file)["machine"] == machine() and "bits" in wanted:  # of another machine, numbers alone were added
        assert found["bits"] == wanted["bits"]


@pytest.mark.parametrize("file", RECORDINGS)
def test_nothing_recorded_is_left_out(file: str):
    assert recorded(file)["results"].keys() == RECORDINGS[file].keys(), "record anew: python tests/goldens/record.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_the_recorded_configuration(name: str):
    assert printed_config(name) == printed_path(name).read_text()


def test_no_configuration_is_left_out():
    assert set(PRINTED.iterdir()) == set(map(printed_path, COMMANDS))
