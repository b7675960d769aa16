"""Some two hundred broken tuners, saved and published ones: each is refused in one line, and nothing else happens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from broken_published import FILE, broken_archives, broken_pickles, good
from broken_saved import Payload, broken_config, broken_weights
from cases import TiedLM

from l2l.tuners.api import Tuner

pytestmark = pytest.mark.in_turn

MOST_MIB = 500
DAILY = 60
"""Cases of the default run, drawn by the date."""


@pytest.fixture(scope="module", params=["daily", pytest.param("all", marks=pytest.mark.slow)])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of each case; they are made here and tried in one other process."""
    room = tmp_path_factory.mktemp("broken")
    marker, root = room / "payload-ran", room / "cases"
    saved = Tuner.for_model(TiedLM(), seed=3, hidden=8).save_pretrained(root / "saved-good")
    (root / "published-good").mkdir()
    torch.save(good(), root / "published-good" / FILE)
    ways = [("saved", *one) for one in (*broken_weights(str(marker)), *broken_config())]
    ways += [("published", *one) for one in (*broken_archives(), *broken_pickles(str(marker)))]
    assert len({(form, what) for form, what, _ in ways}) == len(ways)
    if request.param == "daily":
        ways = Random(date.today().toordinal()).sample(ways, DAILY)
    for number, (form, _, change) in enumerate(ways):
        folder = root / f"{form}-{number:03d}"
        shutil.copytree(saved if form == "saved" else root / "published-good", folder)
        change(folder)
    script = Path(__file__).parent / "try_broken.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=room)
    assert done.returncode == 0, done.stderr
    named = {f"{form}-{number:03d}": f"{form}: {what}" for number, (form, what, _) in enumerate(ways)}
    return {**json.loads(done.stdout), "named": named, "marker": marker.exists(), "room": sorted(os.listdir(room))}


def test_the_payload_would_write_a_file_if_it_ran(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()


def test_every_case_was_tried(outcome: dict[str, Any]):
    assert set(outcome["cases"]) == {*outcome["named"], "saved-good", "published-good"}


def test_the_good_ones_are_taken(outcome: dict[str, Any]):
    for name in ("saved-good", "published-good"):
        assert outcome["cases"][name]["kind"] == "none", outcome["cases"][name]


def test_each_broken_one_is_refused_with_one_clear_line(outcome: dict[str, Any]):
    wrong = {
        what: outcome["cases"][case]
        for case, what in outcome["named"].items()
        if outcome["cases"][case]["kind"] not in ("ValueError", "FileNotFoundError")
        or "\n" in outcome["cases"][case]["text"]
        or not 20 < len(outcome["cases"][case]["text"]) < 1000
    }
    assert not wrong


def test_no_code_runs_and_nothing_is_written_outside(outcome: dict[str, Any]):
    assert not outcome["marker"]
    assert outcome["seen"] == []
    assert outcome["room"] == ["cases"]


def test_nothing_half_written_remains(outcome: dict[str, Any]):
    left = {what: outcome["cases"][case]["left"] for case, what in outcome["named"].items()}
    assert not {what: files for what, files in left.items() if files}


def test_memory_stays_low(outcome: dict[str, Any]):
    assert outcome["growth_mib"] < MOST_MIB
