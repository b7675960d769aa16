"""A fine-tuning run that is killed or interrupted in the middle, and continued by the same command."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from processes import break_off_when_saved, kill_when_saved

import l2l
from l2l.cli import main
from l2l.report.files import read_tensors

STEPS = 30
SMALL = (
    f"--task world_topic --lr 1e-3 --steps {STEPS} --batch_size 4 --train_size 24 --dev_size 8 --test_size 8"
    " --eval_every 8 --checkpoint_every 5 --log_every 1 --progress false"
)
METHODS = {
    "mezo": [],
    "dizo": ["--method_args", '{"interval": 3, "iterations": 1}'],
    "learned": [],
}


def command(out: Path, method: str, tuner: Path, *more: str) -> list[str]:
    given = ["--tuner", str(tuner)] if method == "learned" else []
    return ["fine-tune", *SMALL.split(), "--method", method, "--out", str(out), *METHODS[method], *given, *more]


@pytest.fixture(scope="module")
def tuner(tmp_path_factory) -> Path:
    return l2l.Tuner.for_model(l2l.load_model("l2l/tiny")).save_pretrained(tmp_path_factory.mktemp("tuner"))


def outcome(out: Path) -> tuple[bytes, bytes]:
    """The run log and the final weights."""
    return (out / "steps.jsonl").read_bytes(), (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tuner, tmp_path_factory) -> Callable[[str], tuple[bytes, bytes]]:
    """Outcome of the uninterrupted run of a method."""

    @cache
    def run(method: str) -> tuple[bytes, bytes]:
        out = tmp_path_factory.mktemp(method)
        assert main(command(out, method, tuner)) == 0
        return outcome(out)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_continued_is_the_uninterrupted_run(method, tuner, uninterrupted, tmp_path):
    kill_when_saved(command(tmp_path, method, tuner), tmp_path)
    assert 0 < read_tensors(tmp_path / "checkpoint.pt")["progress"]["step"] < STEPS
    assert main(command(tmp_path, method, tuner)) == 0
    assert outcome(tmp_path) == uninterrupted(method)
    with (tmp_path / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(STEPS))


@pytest.mark.parametrize("loop", ["bare", "lightning"])
def test_an_interrupted_run_says_so_and_is_continued(loop, tuner, uninterrupted, tmp_path):
    same = command(tmp_path, "mezo", tuner, "--loop", loop)
    said = break_off_when_saved(same, tmp_path)
    assert said == "l2l: interrupted; the same command continues from the last checkpoint\n"
    assert main(same) == 0
    assert outcome(tmp_path) == uninterrupted("mezo")
