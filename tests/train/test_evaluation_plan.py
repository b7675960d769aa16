"""How many rows a run evaluates, what it says of them, and the bars that it shows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

import l2l
from l2l import costs
from l2l.costs import EVALUATION_WORK, FEWEST_ROWS, FREE_OPERATIONS, evaluated_rows
from l2l.report.console import Bars
from l2l.report.run_directory import read_tensors
from l2l.train.config import FineTuneConfig
from l2l.train.evaluate import EvaluateConfig, run_evaluation

pytestmark = pytest.mark.in_turn

THERE = {"train": 500, "dev": 200, "test": 500}
TIMES = {"train": 2, "dev": 3, "test": 2}
LARGE = 10**12
"""Parameters of a model of which no evaluation is free."""
RUN: dict[str, Any] = {
    **{"task": "world_topic", "lr": 1e-3, "batch_size": 4, "train_size": 60},
    **{"progress": False, "save": "log"},
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model counts as one of which evaluations cost."""
    monkeypatch.setattr(costs, "FREE_OPERATIONS", 0.0)


def fine_tune(out: Path, **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune("l2l/tiny", out=str(out), **{**RUN, **options})


def work(rows: dict[str, int], row: int) -> int:
    return row * sum(rows[kind] * TIMES[kind] for kind in rows)


def test_all_rows_are_evaluated_where_training_takes_twice_as_long():
    trained = 2 * work(THERE, 50)
    assert evaluated_rows(THERE, (), TIMES, 50, trained, LARGE) == THERE
    assert evaluated_rows(THERE, (), TIMES, 50, trained - 500, LARGE) == {"train": 499, "dev": 199, "test": 499}


@pytest.mark.parametrize("trained", [60_000, 100_000, 200_000])
def test_else_as_many_as_take_a_third_of_the_run(trained):
    rows = evaluated_rows(THERE, (), TIMES, 50, trained, LARGE)
    assert 0.95 * EVALUATION_WORK * trained < work(rows, 50) <= EVALUATION_WORK * trained


def test_rows_that_were_asked_for_stay_and_the_others_take_what_is_left():
    rows = evaluated_rows(THERE, {"train", "test"}, TIMES, 50, 2 * 50 * (2000 + 150), LARGE)
    assert rows == {"train": 500, "dev": 50, "test": 500}
    assert evaluated_rows(THERE, {"dev"}, TIMES, 50, 0, LARGE) == {"train": FEWEST_ROWS, "dev": 200, "test": FEWEST_ROWS}
    assert evaluated_rows({"dev": 20}, (), {"dev": 3}, 50, 0, LARGE) == {"dev": 20}


def test_a_small_model_evaluates_all_rows_however_short_the_run():
    model = sum(parameter.numel() for parameter in l2l.load_model("l2l/tiny").parameters())
    assert evaluated_rows(THERE, (), TIMES, 124, 0, model) == THERE  # 124: tokens of a row of the longest embedded task
    assert work(THERE, 124) * 2 * model < FREE_OPERATIONS


def test_the_default_of_a_short_run_is_said_in_one_line_that_names_the_way_out(tmp_path, caplog, large):
    with caplog.at_level(logging.WARNING):
        summary = fine_tune(tmp_path / "short", steps=2).summary
    line = "evaluating 32 of 500 test rows and 32 of 200 dev rows, so that evaluations take at most a third of the run"
    assert [record.message for record in caplog.records] == [f"{line}; set test_size and dev_size to evaluate more"]
    assert summary["rows"] == {"train": 60, "dev": 32, "test": 32}
    assert (summary["best"]["dev"]["n"], summary["last"]["test"]["n"], summary["last"]["train"]["n"]) == (32, 32, 32)
    caplog.clear()
    given = fine_tune(tmp_path / "given", steps=2, test_size=70, dev_size=40).summary
    assert given["rows"] == {"train": 60, "dev": 40, "test": 70} and not caplog.records


def test_rows_are_the_first_of_those_that_a_long_run_evaluates(tmp_path, large):
    assert fine_tune(tmp_path, steps=2).summary["last"]["test"]["n"] == 32
    same = fine_tune(tmp_path / "given", steps=2, test_size=32, dev_size=32).summary
    assert same["last"] == json.loads((tmp_path / "summary.json").read_text())["last"]


def test_a_run_of_seconds_plans_by_a_measurement_and_keeps_its_plan(tmp_path, large, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def run(seconds_per_step: float) -> Any:
        expected = costs.Expectation(2**30, seconds_per_step, 0)
        monkeypatch.setattr("l2l.train.trainer.expect", lambda *_, **__: expected)
        return fine_tune(tmp_path, max_seconds=4.0, steps=6, checkpoint_every=1).summary

    with monkeypatch.context() as patch:
        patch.setattr("l2l.train.trainer.draw_curves", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(1.0)
    first = read_tensors(tmp_path / "checkpoint.safetensors")["plan"]
    assert (first["steps"], first["every"], first["test"]) == (4, 1, 32)
    assert run(2.0)["evaluations"] == first


def test_every_phase_has_a_bar_and_the_whole_one_too(tmp_path, monkeypatch):
    seen: dict[str, list[float]] = {}
    update = Progress.update

    def watched(self: Progress, task: Any, **options: Any) -> None:
        update(self, task, **options)
        found = next(one for one in self.tasks if one.id == task)
        seen.setdefault(found.description, []).append(found.percentage)

    monkeypatch.setattr(Progress, "update", watched)
    fine_tune(tmp_path, steps=4, eval_every=2, dev_size=40, test_size=40, progress=True, save="both")
    whole = seen.pop("world_topic mezo")
    assert set(seen) >= {"evaluate dev", "evaluate train", "train", "evaluate test"}
    assert all(max(shares) == pytest.approx(100) for shares in seen.values())
    assert whole == sorted(whole) and whole[-1] == 100
    assert len(seen["train"]) == 4 and seen["evaluate dev"][:2] == [80, 100]


def test_a_phase_that_ends_early_counts_as_done_and_phases_may_be_nested():
    with Bars("whole", 100.0, visible=False) as bars:
        whole = bars._bars.tasks[0]
        with bars.phase("train", 10, 8.0) as advance:
            advance(2)
            with bars.phase("evaluate", 10, 1.0) as inner:
                inner(10)
            assert whole.completed == 26
        assert whole.completed == 90
    assert whole.completed == 100


def test_evaluations_advance_by_row_and_answers_count_too(tmp_path, monkeypatch):
    counts: list[float] = []
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda s, t, **o: (counts.append(o["advance"]), update(s, t, **o)))
    run_evaluation(EvaluateConfig(rows=50, batch_size=20))
    assert counts == [20, 20, 10]


@pytest.mark.parametrize("name", ["dev_size", "test_size", "eval_every"])
def test_sizes_are_whole_numbers_or_left_open(name):
    assert getattr(FineTuneConfig(), name) is None
    with pytest.raises(ValueError, match=name):
        FineTuneConfig(**{name: 0})
