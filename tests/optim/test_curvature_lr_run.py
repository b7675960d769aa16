"""Runs with ``lr: auto`` and with schedules: what they log, what they cost, and that they learn."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from cases import Quadratic, same_bits, weights
from daily import daily_slice

import l2l
from l2l.cli import main
from l2l.optim import CurvatureLR, schedule_factor
from l2l.train.config import FineTuneConfig
from l2l.train.runlog import read_run_log

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    "task": "world_topic",
    "batch_size": 4,
    "train_size": 24,
    "dev_size": 12,
    "test_size": 12,
    "eval_every": 100,
    "checkpoint_every": 100,
    "log_every": 1,
    "progress": False,
    "save": "log",
}


def fine_tune(out: Path, **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune(out=str(out), **{**SMALL, "steps": 8, **options})


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def lines(out: Path) -> list[dict[str, Any]]:
    return read_run_log(out)[1]


def test_the_factor_of_each_schedule_falls_from_one_to_its_end():
    assert [schedule_factor("constant", p, 0.5) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [schedule_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [schedule_factor("linear", p, 0.2) for p in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])
    half = (1 + math.sqrt(0.5)) / 2
    assert [schedule_factor("cosine", p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([1, half, 0.5, 0], abs=1e-15)
    assert schedule_factor("cosine", 1, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("method", daily_slice(["mezo", "dizo"], 1))
def test_under_auto_and_a_schedule_both_loops_do_the_same_bit_for_bit(method, tmp_path):
    args = {"interval": 3, "iterations": 1} if method == "dizo" else {}
    options = {"lr": "auto", "schedule": "linear", "method": method, "method_args": args}
    bare, lightning = (fine_tune(tmp_path / loop, loop=loop, **options) for loop in ("bare", "lightning"))
    assert (bare.out / "steps.l2l").read_bytes() == (lightning.out / "steps.l2l").read_bytes()
    assert same_bits(weights(bare.model), weights(lightning.model))


def test_the_logs_tell_the_rate_and_the_curvature_that_every_step_reads_from_the_logits(tmp_path):
    summary = fine_tune(tmp_path, lr="auto", step_fraction=0.2, curvature_every=3).summary
    rows, steps = metrics(tmp_path), lines(tmp_path)
    assert [line["passes"] for line in steps] == [3] + [2] * 7  # the first step cannot know that logits will come
    assert summary["passes"] == 17
    assert summary["lr"] == "auto"
    total, weight, decay = 0.0, 0.0, 0.9 ** (1 / 3)
    for row, line in zip(rows, steps, strict=True):
        assert float(row["curvature"]) == line["curvature"] > 0
        total, weight = decay * total + (1 - decay) * line["curvature"], decay * weight + 1 - decay
        rate = 0.0 if line["step"] < 2 else 0.2 / (total / weight)
        assert float(row["lr"]) == line["lr"] == pytest.approx(rate)


def test_of_an_objective_without_logits_a_third_loss_tells_the_curvature_where_it_is_due(tmp_path):
    options = {"objective": "accuracy", "max_new_tokens": 1, "epsilon": 0.3}
    summary = fine_tune(tmp_path, lr="auto", step_fraction=0.2, curvature_every=3, **options).summary
    due = [0, 1, 2, 3, 4, 6]
    steps = lines(tmp_path)
    assert [line["step"] for line in steps if "curvature" in line] == due
    assert [line["passes"] for line in steps] == [3 if line["step"] in due else 2 for line in steps]
    assert summary["passes"] == 22


def test_a_run_at_a_constant_rate_logs_no_curvature(tmp_path):
    fine_tune(tmp_path, lr=1e-4)
    assert {row["curvature"] for row in metrics(tmp_path)} == {""}
    assert all(line["lr"] == 1e-4 and "curvature" not in line for line in lines(tmp_path))


def test_a_schedule_follows_steps_or_passes_whichever_is_further(tmp_path):
    fine_tune(tmp_path / "steps", lr=1e-3, schedule="linear")
    assert [line["lr"] for line in lines(tmp_path / "steps")] == pytest.approx([1e-3 * (1 - k / 8) for k in range(8)])
    fine_tune(tmp_path / "passes", lr=1e-3, schedule="linear", schedule_end=0.5, max_passes=10)
    wanted = [1e-3 * (1 - 0.5 * k / 5) for k in range(5)]
    assert [line["lr"] for line in lines(tmp_path / "passes")] == pytest.approx(wanted)


def test_a_schedule_scales_the_step_fraction(tmp_path):
    fine_tune(tmp_path / "plain", lr="auto", step_fraction=0.1, steps=3)
    fine_tune(tmp_path / "tenfold", lr="auto", step_fraction=1.0, steps=3)
    plain, tenfold = (lines(tmp_path / name)[2]["lr"] for name in ("plain", "tenfold"))
    assert tenfold == pytest.approx(10 * plain) != 0
    options = {"lr": "auto", "step_fraction": 0.1, "steps": 10, "curvature_every": 100}
    fine_tune(tmp_path / "linear", schedule="linear", **options)
    total, weight, decay = 0.0, 0.0, 0.9**0.01
    for k, line in enumerate(lines(tmp_path / "linear")):
        total, weight = decay * total + (1 - decay) * line["curvature"], decay * weight + 1 - decay
        assert line["lr"] == pytest.approx(0.0 if k < 2 else 0.1 * (1 - k / 10) / (total / weight))


@pytest.mark.parametrize("step_fraction", daily_slice([0.03, 0.1, 0.3], 1))
def test_a_short_run_lowers_the_loss_from_any_step_fraction_of_that_order(step_fraction, tmp_path):
    summary = fine_tune(tmp_path, lr="auto", step_fraction=step_fraction, steps=80, batch_size=8).summary
    assert summary["final_loss"] < summary["initial_loss"] - 0.02


@pytest.mark.parametrize(("given", "wanted"), [("auto", "auto"), ("1e-4", 1e-4), ("0.5", 0.5), ("1", 1)])
@pytest.mark.parametrize("source", ["flag", "yaml"])
def test_the_command_line_takes_auto_and_numbers(source, given, wanted, tmp_path, monkeypatch):
    seen: list[FineTuneConfig] = []
    monkeypatch.setattr("l2l.train.trainer.fine_tune_command", seen.append)
    file = tmp_path / "run.yaml"
    file.write_text(f"lr: {given}\nschedule: cosine\n")
    options = ["--lr", given, "--schedule", "cosine"] if source == "flag" else ["--config", str(file)]
    assert main(["fine-tune", *options]) == 0
    assert (seen[0].lr, seen[0].schedule) == (wanted, "cosine")
    assert isinstance(seen[0].lr, str) == isinstance(wanted, str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "lr='fast' must be a number, auto or left out"),
        ({"step_fraction": -1.0}, "step_fraction=-1.0 must be positive and finite"),
        ({"curvature_every": 0}, "curvature_every=0 must be a whole number"),
        ({"schedule": "step"}, "schedule='step' must be constant, linear, cosine or left out"),
        ({"schedule_end": 1.5}, "schedule_end=1.5 must be between 0 and 1"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FineTuneConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "lr='fast' must be a number"),
        ({"lr": "auto", "step_fraction": 0.0}, "step_fraction=0.0 must be positive and finite"),
        (
            {"lr": 0.1, "step_fraction": 0.1},
            "lr=0.1 is a number, so step_fraction and curvature_lr mean nothing: pass lr='auto'",
        ),
        ({"lr": 0.1, "curvature_lr": CurvatureLR()}, "lr=0.1 is a number, so step_fraction and curvature_lr"),
    ],
)
def test_arguments_that_make_no_sense_together_are_refused(options: dict[str, Any], message: str):
    for make in (l2l.MeZO, l2l.DiZO):
        with pytest.raises(ValueError, match=message):
            make(Quadratic(), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 must be a whole number"),
        ({"warm_up": -1}, "warm_up=-1 must be a whole number, at least 0"),
        ({"decay": 1.0}, "decay=1.0 must be at least 0 and below 1"),
        ({"resolution": float("nan")}, "resolution=nan must be at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CurvatureLR(**settings)
