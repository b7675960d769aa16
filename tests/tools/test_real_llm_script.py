"""``benchmarks/real_llm.py``: contenders at equal cost, tuning counted, on the embedded model in place of a real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tools.test_lr_scripts import loaded

import l2l
from l2l.experiments.runner import Record, Trial, run_trial
from l2l.report.run_directory import METRICS, read_metrics
from l2l.tuners import Depth, TrainingPlan

pytestmark = pytest.mark.in_turn

PLAN = TrainingPlan(method="rsgn", lr=1.0, num_directions=3, depths=[Depth(0.0, "top:1")])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("real_llm")


@pytest.fixture
def done(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of the trials that were asked for; they run in this process."""
    found: list[str] = []

    def executor(trials: list[Trial], after_each: Any) -> list[Record]:
        found.extend(trial.out for trial in trials)
        return [run_trial(trial) for trial in trials]

    monkeypatch.setattr(script, "executor_of", lambda name, processes, address=None: executor)
    return found


def last_dev_loss(folder: Path) -> float:
    return float([row["dev_loss"] for row in read_metrics(folder / METRICS) if row["dev_loss"]][-1])


def test_budgets_are_equal_tuning_is_counted_and_nothing_runs_twice(
    script: ModuleType, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    l2l.Tuner.for_model(l2l.load_model("l2l/tiny")).with_plan(PLAN).save_pretrained(tmp_path / "tuner")
    sizes = "--train_size 32 --dev_size 16 --test_size 16 --seeds 1 --budget 12 --unit passes"
    given = f"real_llm --model l2l/tiny --tuner {tmp_path / 'tuner'} --tasks world_topic --contenders MeZO {sizes}"
    monkeypatch.setattr(sys, "argv", [*given.split(), "--out", str(tmp_path / "runs")])
    script.main()
    folders, first = set(done), json.loads((tmp_path / "runs" / "table.json").read_text())
    trials = [json.loads((Path(folder) / "summary.json").read_text()) for folder in done]
    whole = [trial for trial in trials if trial["method"] == "mezo" and trial["config"]["test_size"] == 16]
    thirds = [trial for trial in trials if trial["method"] == "mezo" and trial["config"]["test_size"] == 1]
    assert [trial["passes"] for trial in whole] == [12]
    assert [(trial["config"]["lr"], trial["passes"]) for trial in thirds] == [(lr, 4) for lr in script.GRID]
    rows = {row["contender"]: row for row in first["rows"]}
    losses = {trial["config"]["lr"]: last_dev_loss(Path(trial["config"]["out"])) for trial in thirds}
    assert (rows["MeZO"]["lr"], rows["MeZO"]["tuning counted"]) == min(losses.items(), key=lambda item: item[1])
    planned = next(trial for trial in trials if trial["method"] == "rsgn")
    assert (planned["config"]["train_layers"], rows["tuner"]["lr"]) == ("top:1", None)
    assert planned["passes"] % 4 == 0 < planned["passes"], "whole steps of a centre and three directions"
    script.main()
    assert set(done) == folders
    again = json.loads((tmp_path / "runs" / "table.json").read_text())
    assert again["rows"] == first["rows"], "costs are measured once"
