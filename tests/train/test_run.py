"""A fine-tuning run from its arguments to the files it leaves."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits, weights
from daily import daily_slice
from safetensors.torch import load_file

import l2l
from l2l.methods.mezo import MeZO
from l2l.train.config import FineTuneConfig
from l2l.train.evaluate import EvaluateConfig
from l2l.train.evaluate import run_evaluation as evaluate
from l2l.train.inputs import RunInputs, tuner_fingerprint
from l2l.train.runlog import read_run_log
from l2l.train.trainer import Session, prepare_fine_tuning

pytestmark = pytest.mark.in_turn

TASK = "world_topic"
SMALL: dict[str, Any] = {
    "task": TASK,
    "lr": 1e-3,
    "batch_size": 4,
    "train_size": 24,
    "dev_size": 12,
    "test_size": 12,
    "eval_every": 3,
    "checkpoint_every": 4,
    "log_every": 1,
    "progress": False,
}


def fine_tune(out: Path, model: Any = "l2l/tiny", **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune(model, out=str(out), **{**SMALL, "steps": 6, **options})


def steps(out: Path) -> bytes:
    return (out / "steps.l2l").read_bytes()


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> l2l.FineTuneResult:
    """A finished run of the bare loop."""
    return fine_tune(tmp_path_factory.mktemp("run"))


def test_a_run_leaves_the_files_it_promises(done):
    left = sorted(entry.name for entry in done.out.iterdir())
    events = [name for name in left if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    files = ["config.yaml", "loss.png", "metrics.csv", "model", "run.json", "steps.l2l", "summary.json"]
    assert sorted(set(left) - set(events)) == files
    assert (done.out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_summary_says_what_ran_on_what_and_what_came_out(done):
    summary = json.loads((done.out / "summary.json").read_text())
    assert (summary["task"], summary["method"], summary["model"]["id"]) == (f"{TASK}@1", "mezo", "l2l/tiny")
    assert (summary["steps"], summary["passes"], summary["seed"]) == (6, 12, 0)
    assert summary["rows"] == {"train": 24, "dev": 12, "test": 12}
    assert {"torch", "transformers", "python"} <= summary["environment"]["versions"].keys()
    assert 0 < summary["final_loss"] < 10
    assert 0 <= summary["accuracy"] <= 1
    assert summary["config"]["lr"] == 1e-3


def test_every_step_is_in_the_run_log_and_in_the_metrics(done):
    head, lines = read_run_log(done.out)
    assert {name: head[name] for name in ("seed", "epsilon", "method", "tuner")} == {
        "seed": 0,
        "epsilon": 1e-3,
        "method": "mezo",
        "tuner": None,
    }
    assert [line["step"] for line in lines] == list(range(6))
    rows = metrics(done.out)
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert [row["step"] for row in rows if row["dev_loss"]] == ["2", "5"]
    for line, row in zip(lines, rows, strict=True):
        gradient, plus, minus = line["directions"][0]
        assert gradient == pytest.approx((plus - minus) / 2e-3)
        assert float(row["train_loss"]) == (plus + minus) / 2
        assert (float(row["projected_gradient"]), float(row["lr"])) == (gradient, line["lr"])


def test_the_saved_model_is_the_best_one_and_scores_what_the_summary_says(done):
    model = l2l.load_model(done.out / "model")
    assert same_bits(weights(model), weights(done.model))
    scores = evaluate(EvaluateConfig(model=str(done.out / "model"), task=TASK, rows=12, progress=False))
    assert scores["loss"] == done.summary["best"]["test"]["loss"]
    assert scores["accuracy"] == done.summary["best"]["test"]["value"]


@pytest.mark.parametrize("method", daily_slice(["mezo", "dizo"], 1))
def test_the_bare_and_the_lightning_loop_do_the_same_bit_for_bit(method, tmp_path):
    args = {"interval": 2, "iterations": 1} if method == "dizo" else {}
    bare = fine_tune(tmp_path / "bare", method=method, method_args=args)
    lightning = fine_tune(tmp_path / "lightning", method=method, method_args=args, loop="lightning")
    assert steps(bare.out) == steps(lightning.out)
    assert same_bits(weights(bare.model), weights(lightning.model))
    assert bare.summary["best"] == lightning.summary["best"]


@pytest.mark.parametrize("loop", ["bare", "lightning"])
def test_a_run_ends_when_its_forward_passes_are_spent(loop, tmp_path):
    result = fine_tune(tmp_path, steps=50, max_passes=9, loop=loop)
    assert (result.summary["passes"], result.summary["steps"]) == (10, 5)
    assert [row["passes"] for row in metrics(tmp_path)] == ["2", "4", "6", "8", "10"]


class Clock:
    """Stands in for the module ``time``; time passes when something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def before(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """The function, which takes so many seconds."""

        def timed(*args: Any, **options: Any) -> Any:
            self.now += seconds
            return function(*args, **options)

        return timed


@pytest.mark.parametrize("loop", ["bare", "lightning"])
def test_seconds_alone_end_a_run_and_evaluations_do_not_count(loop, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("l2l.train.trainer.time", clock)
    monkeypatch.setattr(Session, "step", clock.before(Session.step, 0.25))
    monkeypatch.setattr(RunInputs, "score", clock.before(RunInputs.score, 8.0))
    summary = fine_tune(tmp_path, steps=None, max_seconds=0.6, eval_every=2, loop=loop).summary
    assert [row["seconds"] for row in metrics(tmp_path)] == ["0.25", "0.5", "0.75"]
    assert (summary["config"]["steps"], summary["steps"], summary["train_seconds"]) == (None, 3, 0.75)
    evaluations = 2 + 2 + 4  # before: dev and train; after two steps and the last; and after the run
    assert (summary["evaluate_seconds"], summary["cache_seconds"]) == (8.0 * evaluations, 0)
    assert summary["dev_loss"] == summary["best"]["dev"]["loss"]
    assert metrics(tmp_path)[-1]["dev_loss"]


def test_passes_alone_end_a_run_and_a_method_with_a_horizon_plans_for_them(tmp_path):
    tuner = l2l.Tuner.for_model(l2l.load_model("l2l/tiny"))
    config = FineTuneConfig(**{**SMALL, "method": "learned", "max_passes": 9, "out": str(tmp_path)})
    context = prepare_fine_tuning(config, tuner=tuner)
    assert (config.steps, context.optimizer.method.horizon) == (None, 5)
    result = fine_tune(tmp_path, steps=None, max_passes=9, method="learned", tuner=tuner)
    assert (result.summary["passes"], result.summary["steps"]) == (10, 5)


def test_without_any_limit_a_run_has_2000_steps():
    assert FineTuneConfig().steps == 2000 == FineTuneConfig(steps=2000, max_seconds=1.0).steps


def test_time_of_evaluations_is_counted_apart_and_across_a_resume(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("l2l.train.trainer.time", clock)
    monkeypatch.setattr(Session, "step", clock.before(Session.step, 0.25))
    monkeypatch.setattr(RunInputs, "score", clock.before(RunInputs.score, 8.0))
    with monkeypatch.context() as patch:
        patch.setattr("l2l.train.trainer.draw_curves", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tmp_path)
    clock.now += 1000.0  # between the two tries
    summary = fine_tune(tmp_path).summary
    evaluations = 2 + 2 + 4  # before: dev and train; at steps 3 and 6; and after, of which only the second try counts
    assert summary["evaluate_seconds"] == 8.0 * evaluations
    assert summary["train_seconds"] == summary["seconds"] == 0.25 * 6


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_passes_of_a_search_count(tmp_path):
    args = {"interval": 3, "iterations": 2}
    result = fine_tune(tmp_path, method="dizo", method_args=args, steps=50, max_passes=10)
    spent = [int(row["passes"]) for row in metrics(tmp_path)]
    assert spent[:2] == [2, 4]
    assert spent[2] == 10
    assert result.summary["passes"] == 10


def test_the_best_step_is_the_one_of_lowest_dev_loss(tmp_path):
    result = fine_tune(tmp_path, eval_every=1, steps=8)
    losses = {int(row["step"]): float(row["dev_loss"]) for row in metrics(tmp_path)}
    best = result.summary["best"]
    assert best["dev"]["loss"] <= min(losses.values())
    assert best["step"] == -1 or losses[best["step"]] == best["dev"]["loss"]


def test_a_run_that_only_gets_worse_ends_with_the_weights_it_began_with(tmp_path):
    result = fine_tune(tmp_path, lr=1.0, eval_every=1, steps=2)
    assert result.summary["best"]["step"] == -1
    assert result.summary["last"]["test"]["loss"] > result.summary["best"]["test"]["loss"]
    assert same_bits(weights(result.model), weights(l2l.load_model("l2l/tiny")))


def test_the_seed_fixes_the_run(done, tmp_path):
    same = fine_tune(tmp_path / "same", save="log")
    other = fine_tune(tmp_path / "other", save="log", seed=1)
    assert same_bits(weights(same.model), weights(done.model))
    assert steps(same.out) == steps(done.out)
    assert read_run_log(other.out)[1][0] != read_run_log(done.out)[1][0]
    assert not (same.out / "model").exists()


@pytest.mark.parametrize("method", [l2l.MeZO, MeZO(epsilon=1e-3)], ids=["optimizer", "object"])
def test_a_method_may_be_given_by_optimizer_or_as_an_object(method, done, tmp_path):
    model = l2l.load_model("l2l/tiny")
    result = fine_tune(tmp_path, model, method=method, save="log")
    assert result.model is model
    assert result.summary["method"] == "mezo"
    assert steps(tmp_path) == steps(done.out)


def test_the_learned_method_runs_with_a_tuner_object(tmp_path):
    model = l2l.load_model("l2l/tiny")
    tuner = l2l.Tuner.for_model(model)
    result = fine_tune(tmp_path, model, method=l2l.ZOFineTuner, tuner=tuner, save="log")
    assert result.summary["method"] == "learned"
    assert read_run_log(tmp_path)[0]["tuner"] == tuner_fingerprint(tuner)


def test_a_finished_run_is_not_run_again(done):
    before = {path.name: path.stat().st_mtime_ns for path in done.out.iterdir()}
    with pytest.raises(ValueError, match="holds this run, finished"):
        fine_tune(done.out)
    assert {path.name: path.stat().st_mtime_ns for path in done.out.iterdir()} == before


def test_a_run_that_fails_while_its_summary_is_written_can_be_continued(done, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("l2l.report.run_directory.write_json", full)
        with pytest.raises(OSError, match="no space"):
            fine_tune(tmp_path)
    result = fine_tune(tmp_path)
    assert same_bits(weights(result.model), weights(done.model))
    assert steps(tmp_path) == steps(done.out)


def test_a_run_goes_back_to_the_newest_whole_checkpoint_and_ends_the_same(done, tmp_path, monkeypatch, caplog):
    """Kind B4 of issue 16: a damaged file of a run is named, and what is left of it goes on to the same weights."""
    with monkeypatch.context() as patch:
        patch.setattr("l2l.train.trainer.draw_curves", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tmp_path)
    last = tmp_path / "checkpoint.safetensors"
    last.write_bytes(last.read_bytes()[:-7])
    (tmp_path / "best.safetensors").write_bytes(b"garbage")
    with monkeypatch.context() as patch:
        patch.setattr("l2l.train.trainer.draw_curves", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tmp_path)
    said = [record.message for record in caplog.records if "is not readable" in record.message]
    assert len(said) == 2
    assert re.search(
        r"checkpoint.safetensors is not readable: it has .*; continuing from the one before, checkpoint.1", said[0]
    )
    assert "best.safetensors is not readable: its 7 bytes are cut short" in said[1]
    assert steps(tmp_path) == steps(done.out)
    for name in ("checkpoint.safetensors", "checkpoint.1.safetensors"):
        (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"no checkpoint is left: .*checkpoint.safetensors .*checkpoint.1.*--overwrite true"):
        fine_tune(tmp_path)


def test_the_model_on_disk_holds_float32_weights_under_their_own_names(done):
    saved = load_file(done.out / "model" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    assert "model.embed_tokens.weight" in saved
