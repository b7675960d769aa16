"""A meta-training run from its arguments to the tuner it leaves."""

from __future__ import annotations

import csv
import datetime
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bowl import TINY
from cases import same_bits, weights
from processes import break_off_when_saved, kill_when_saved

import l2l
from l2l.cli import main
from l2l.meta.module import MetaTraining
from l2l.report.run_directory import read_tensors
from l2l.tuners.diagnostics import movement

pytestmark = pytest.mark.in_turn

SHARED = Path(os.environ.get("L2L_SHARED", Path(__file__).parents[3] / "shared"))
STEPS = 8
SMALL: dict[str, Any] = {
    "tasks": ["world_topic", "world_job"],
    "validation_tasks": ["world_season"],
    "steps": STEPS,
    "lr": 1e-3,
    "outer_lr": 10.0,
    "batch_size": 4,
    "train_size": 16,
    "dev_size": 8,
    "restart_every": 3,
    "validate_every": 4,
    "validation_steps": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "progress": False,
}


def meta_train(out: Path, model: Any = "l2l/tiny", **options: Any) -> l2l.Tuner:
    return l2l.meta_train(model, out=str(out), **{**SMALL, **options})


def command(out: Path, **options: Any) -> list[str]:
    values = {**SMALL, **options, "out": out}
    flags = {name: ",".join(value) if isinstance(value, list) else str(value) for name, value in values.items()}
    return [
        "meta-train",
        *(f"--{name}={value.lower() if name == 'progress' else value}" for name, value in flags.items()),
    ]


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, l2l.Tuner]:
    out = tmp_path_factory.mktemp("meta")
    return out, meta_train(out)


def test_a_run_leaves_a_tuner_and_the_files_it_promises(done):
    out, tuner = done
    left = {entry.name for entry in out.iterdir()}
    events = {name for name in left if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    files = {
        "README.md",
        "config.json",
        "config.yaml",
        "meta.png",
        "metrics.csv",
        "run.json",
        "summary.json",
        "tuner.safetensors",
    }
    assert left - events == files
    assert (out / "meta.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loaded = l2l.Tuner.from_pretrained(out)
    found, expected = loaded.network.state_dict(), tuner.network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.provenance.base_model == "l2l/tiny"
    assert loaded.provenance.recipe["tasks"] == ["world_topic", "world_job"]


def test_the_tuner_kept_is_the_best_by_validation(done):
    out, tuner = done
    summary = json.loads((out / "summary.json").read_text())
    assert (max(movement(tuner)) > 0) == (summary["best_step"] > 0)
    assert tuner.provenance.results["validation_loss"] == summary["validation_loss"]
    assert summary["validation_loss"] == min(loss for _, loss in summary["validations"])


def test_outer_steps_are_counted_and_the_tasks_come_in_turn(done):
    out, _ = done
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert [step for step, _ in summary["validations"]] == [0, 4, 8]
    trained = [row for row in metrics(out) if row["train_loss"]]
    assert [(int(row["step"]), int(row["task"])) for row in trained] == [(step, step % 2) for step in range(STEPS)]
    validated = [row for row in metrics(out) if row["validation_loss"]]
    assert [[int(row["step"]), float(row["validation_loss"])] for row in validated] == summary["validations"]


@pytest.mark.parametrize("name", ["train_loss", "validation_loss"])
def test_tensorboard_has_the_same_scalars(name, done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = done
    board = EventAccumulator(str(out)).Reload()
    shown = [(event.step, event.value) for event in board.Scalars(name)]
    written = [(int(r["step"]), float(r[name])) for r in metrics(out) if r[name]]
    assert shown == [(step, pytest.approx(value)) for step, value in written]


def test_the_model_given_has_its_initial_weights_afterwards(done, tmp_path):
    model = l2l.load_model("l2l/tiny")
    before = weights(model)
    tuner = meta_train(tmp_path, model)
    assert same_bits(weights(model), before)
    expected = done[1].network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tuner.network.state_dict().items())


def test_the_model_given_has_its_initial_weights_after_a_failure_too(tmp_path, monkeypatch):
    model = l2l.load_model("l2l/tiny")
    before = weights(model)

    def stopped(*_: Any) -> float:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr("l2l.meta.module.apply_velocity", stopped)
    with pytest.raises(FloatingPointError):
        meta_train(tmp_path, model)
    assert same_bits(weights(model), before)
    assert not (tmp_path / "tuner.safetensors").exists()


def one_of_today(cases: list[Any]) -> list[Any]:
    """All cases, of which one runs by default, another one every day."""
    today = datetime.date.today().toordinal() % len(cases)
    return [case if i == today else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


def outcome(out: Path) -> tuple[bytes, bytes]:
    """The tuner's weights and the metrics."""
    return (out / "tuner.safetensors").read_bytes(), (out / "metrics.csv").read_bytes()


LONGER = {"steps": 12, "validate_every": 6}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out, **LONGER)) == 0
    return out


@pytest.mark.parametrize("how", one_of_today(["killed", "interrupted", "terminated"]))
def test_a_run_broken_off_and_continued_is_the_uninterrupted_run(how, uninterrupted, tmp_path):
    same = command(tmp_path, **LONGER)
    if how == "killed":
        kill_when_saved(same, tmp_path)
    else:
        said = break_off_when_saved(same, tmp_path, signal.SIGINT if how == "interrupted" else signal.SIGTERM)
        assert f"a checkpoint is in {tmp_path}, and the same command continues from it\n" in said
    assert 0 < read_tensors(tmp_path / "checkpoint.safetensors")["global_step"] < LONGER["steps"]
    assert main(same) == 0
    assert outcome(tmp_path) == outcome(uninterrupted)
    found, expected = (json.loads((out / "summary.json").read_text()) for out in (tmp_path, uninterrupted))
    assert found["validations"] == expected["validations"]


class Cut(Exception):
    """Stands for whatever ends a process."""


@contextmanager
def cut_at(step: int) -> Iterator[None]:
    """Inside, every run breaks off after outer step ``step``."""
    original = MetaTraining.training_step

    def cut(self: MetaTraining, batch: int, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.global_step == step:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(MetaTraining, "training_step", cut)
        yield


@pytest.mark.parametrize("at", one_of_today([1, 3, 4, 6]))
def test_a_run_may_break_off_anywhere(at, done, tmp_path):
    with cut_at(at):
        meta_train(tmp_path)
    meta_train(tmp_path)
    assert outcome(tmp_path) == outcome(done[0])


RECIPES: dict[str, dict[str, Any]] = {
    "unusual": {
        "objective": "log_progress_rate",
        "trajectory": "mixture",
        "sampling": "random",
        "task_weights": [2.0, 1.0],
        "outer_optimizer": "adam",
        "features": "standard",
        "normalizer": "curvature",
        "restart_histories": True,
    },
    "gradients": {"basis": "gradients", "normalizer": "curvature", "objective": "expected", "architecture": "table"},
    "activations": {"basis": "activations", "block_schedule": "role", "normalizer": "curvature"},
    "random": {
        "basis": "random",
        "architecture": "table",
        "objective": "es_full_run",
        "objective_args": {"population": 1, "steps": 2, "tie": "role"},
        "trajectory": "zo",
    },
}


@pytest.mark.parametrize("recipe", one_of_today(list(RECIPES)))
def test_any_recipe_resumes_exactly_and_measures_nothing_again(recipe, tmp_path, monkeypatch):
    options = {**TINY, "steps": 3, "basis_rank": 4, **RECIPES[recipe]}
    whole = l2l.meta_train(out=str(tmp_path / "whole"), **options)
    assert {vectors.shape[1] for vectors in (whole.basis or {}).values()} == ({4} if "basis" in options else set())
    assert whole.feature_set == options.get("features", "paper")
    assert whole.normalizer.name == options.get("normalizer", "energy")
    assert whole.provenance.recipe["objective"] == options.get("objective", "one_step_loss")
    scheduled = whole.block_schedule is not None, "block_schedule" in whole.provenance.recipe
    assert scheduled == ("block_schedule" in options,) * 2
    assert not (tmp_path / "whole" / "measured.safetensors").exists()
    fresh = l2l.Tuner.for_model(
        l2l.load_model("l2l/tiny"), whole.architecture, basis=whole.basis, features=whole.feature_set
    ).network
    assert any(not torch.equal(a, b) for a, b in zip(whole.network.parameters(), fresh.parameters(), strict=True))

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    with cut_at(3):
        l2l.meta_train(out=str(tmp_path / "cut"), **options)
    assert read_tensors(tmp_path / "cut" / "checkpoint.safetensors")["global_step"] == 2
    for measuring in ("pool_basis", "pool_traces"):
        monkeypatch.setattr(f"l2l.meta.run.{measuring}", again)
    l2l.meta_train(out=str(tmp_path / "cut"), **options)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    loaded = l2l.Tuner.from_pretrained(tmp_path / "cut").basis or {}
    assert all(torch.equal(vectors, loaded[name]) for name, vectors in (whole.basis or {}).items())


def test_a_run_without_a_basis_is_that_of_a_version_that_knew_none(tmp_path):
    """Its directory says nothing of a basis, and it resumes where nothing measured was kept."""
    options = {**TINY, "steps": 3, "normalizer": "curvature"}
    whole = l2l.meta_train(out=str(tmp_path / "whole"), **options)
    assert whole.basis is None
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert not [name for name in config if name.startswith("basis")]
    with cut_at(3):
        l2l.meta_train(out=str(tmp_path / "cut"), **options)
    (tmp_path / "cut" / "measured.safetensors").unlink()
    l2l.meta_train(out=str(tmp_path / "cut"), **options)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_evolution_learns_along_zeroth_order_steps_without_any_backward_pass(tmp_path, monkeypatch):
    """The model moves by the step that the objective has taken."""

    def refused(*_: Any) -> float:
        raise AssertionError("a backward pass through the model")

    for place in ("statistics", "curvature", "trajectory", "objectives.one_step_loss"):
        monkeypatch.setattr(f"l2l.meta.{place}.consume_gradients", refused)
    evolution = {"objective": "evolution", "objective_args": {"population": 1, "steps": 1}, "trajectory": "zo"}
    tuner = l2l.meta_train(out=str(tmp_path), **{**TINY, **evolution, "restart_every": 9})
    fresh = l2l.Tuner.for_model(l2l.load_model("l2l/tiny")).network
    assert any(not torch.equal(a, b) for a, b in zip(tuner.network.parameters(), fresh.parameters(), strict=True))
    assert [row["trajectory_loss"] for row in metrics(tmp_path)] == [row["train_loss"] for row in metrics(tmp_path)]


def test_a_rank_that_no_matrix_is_wide_enough_for_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="basis_rank=4000: no weight matrix"):
        meta_train(tmp_path / "out", basis="random", basis_rank=4000)
    assert not (tmp_path / "out").exists()


def test_without_validation_tasks_nothing_is_judged_and_the_last_tuner_is_kept(tmp_path):
    tuner = meta_train(tmp_path / "out", validation_tasks=[])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["validated"] is False and summary["validations"] == [] and summary["best_step"] == summary["steps"]
    assert all(not row["validation_loss"] for row in metrics(tmp_path / "out"))
    kept = l2l.Tuner.from_pretrained(tmp_path / "out").network.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in tuner.network.state_dict().items())


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no directory {SHARED}: set L2L_SHARED")
def test_a_tuner_is_learned_for_a_model_and_data_on_disk_and_used(tmp_path):
    where = ["--model", str(SHARED / "models/stories260K"), "--data-dir", str(SHARED / "data"), "--progress", "false"]
    sizes = ["--steps", "4", "--batch_size", "4", "--train_size", "16", "--dev_size", "8"]
    validation = ["--validation_steps", "2", "--validate_every", "2"]
    tuner, out = str(tmp_path / "tuner"), str(tmp_path / "out")
    assert main(["meta-train", *where, "--tasks", "trec,sst5", *sizes, *validation, "--out", tuner]) == 0
    learned = ["--task", "sst2", "--method", "learned", "--tuner", tuner, "--test_size", "8"]
    assert main(["fine-tune", *where, *learned, *sizes, "--out", out]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["passes"] == 8


def test_half_precision_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"is torch.bfloat16, but meta-training differentiates.*dtype float32"):
        meta_train(tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
