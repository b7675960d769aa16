"""A fine-tuning run that is killed or interrupted in the middle, and continued by the same command."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from daily import daily_slice
from processes import break_off_when_saved, kill_when_saved

import l2l
from l2l.cli import main
from l2l.report.run_directory import read_tensors

pytestmark = pytest.mark.in_turn

STEPS = 20
SMALL = (
    f"--task world_topic --lr 3e-4 --steps {STEPS} --batch_size 4 --train_size 24 --dev_size 8 --test_size 8"
    " --eval_every 8 --checkpoint_every 5 --log_every 1 --progress false"
)
AUTO = ["--lr", "auto", "--step_fraction", "0.2", "--curvature_every", "3", "--schedule", "cosine"]
RUNS = {
    "mezo": [],
    "mezo auto": AUTO,
    "dizo": ["--method_args", '{"interval": 3, "iterations": 1}'],
    "learned": [],
    "learned auto": AUTO,
}
"""Method, and options of a run with it."""
INTERRUPTED = product((signal.SIGINT, signal.SIGTERM), ("bare", "lightning"), ("mezo", "mezo auto"))
"""Signal, loop, run."""


def command(out: Path, run: str, tuner: Path, *more: str) -> list[str]:
    method = run.split()[0]
    given = ["--tuner", str(tuner)] if method == "learned" else []
    return ["fine-tune", *SMALL.split(), "--method", method, "--out", str(out), *RUNS[run], *given, *more]


@pytest.fixture(scope="module")
def tuner(tmp_path_factory) -> Path:
    return l2l.Tuner.for_model(l2l.load_model("l2l/tiny")).save_pretrained(tmp_path_factory.mktemp("tuner"))


def outcome(out: Path) -> tuple[bytes, bytes]:
    """The run log and the final weights."""
    return (out / "steps.l2l").read_bytes(), (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tuner, tmp_path_factory) -> Callable[[str], tuple[bytes, bytes]]:
    """Outcome of one of the runs, uninterrupted."""

    @cache
    def whole(run: str) -> tuple[bytes, bytes]:
        out = tmp_path_factory.mktemp(run.replace(" ", "_"))
        assert main(command(out, run, tuner)) == 0
        return outcome(out)

    return whole


@pytest.mark.parametrize("run", daily_slice(RUNS, 1))
def test_a_killed_run_continued_is_the_uninterrupted_run(run, tuner, uninterrupted, tmp_path):
    kill_when_saved(command(tmp_path, run, tuner), tmp_path)
    assert 0 < read_tensors(tmp_path / "checkpoint.safetensors")["progress"]["step"] < STEPS
    assert main(command(tmp_path, run, tuner)) == 0
    assert outcome(tmp_path) == uninterrupted(run)
    with (tmp_path / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(STEPS))


@pytest.mark.parametrize(
    ("number", "loop", "run"),
    daily_slice(INTERRUPTED, 1),
)
def test_an_interrupted_run_finishes_its_step_saves_says_so_and_is_continued(number, loop, run, tuner, uninterrupted, tmp_path):
    same = command(tmp_path, run, tuner, "--loop", loop, "--checkpoint_every", "1")
    said = break_off_when_saved(same, tmp_path, number)
    step = read_tensors(tmp_path / "checkpoint.safetensors")["progress"]["step"]
    assert said.splitlines()[-1] == (
        f"l2l: stopped after step {step}; a checkpoint is in {tmp_path}, and the same command continues from it"
    )
    assert main(same) == 0
    assert outcome(tmp_path) == uninterrupted(run)
