"""What a meta-training run may be told: objectives, trajectories, samplings, optimizers; and that it still resumes exactly."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import weights

import l2l
from l2l.meta.config import MetaTrainConfig
from l2l.meta.pool import drawn
from l2l.meta.run import with_defaults
from l2l.meta.trajectory import TrajectoryConfig

TINY: dict[str, Any] = {
    "tasks": ["world_topic", "world_job"],
    "validation_tasks": [],
    "steps": 5,
    "lr": 1e-4,
    "outer_lr": 0.01,
    "batch_size": 2,
    "train_size": 8,
    "dev_size": 4,
    "restart_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "progress": False,
}
UNUSUAL: dict[str, Any] = {
    "objective": "ratio",
    "trajectory": "mixture",
    "sampling": "random",
    "task_weights": [2.0, 1.0],
    "outer_optimizer": "adam",
    "features": "standard",
    "normalizer": "curvature",
    "restart_histories": True,
}


def run(out: Path, **options: Any) -> l2l.Tuner:
    return l2l.meta_train("l2l/tiny", out=str(out), **{**TINY, **options})


def files(out: Path) -> tuple[bytes, bytes]:
    return (out / "tuner.safetensors").read_bytes(), (out / "metrics.csv").read_bytes()


def test_an_unusual_run_broken_off_and_continued_is_the_uninterrupted_run(tmp_path, monkeypatch):
    from l2l.meta.module import MetaModule

    tuner = run(tmp_path / "whole", **UNUSUAL)
    assert tuner.feature_set == "standard" and tuner.normalizer.name == "curvature"
    original = MetaModule.training_step

    def cut(self: MetaModule, batch: int, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.global_step == 4:
            raise ConnectionAbortedError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(MetaModule, "training_step", cut)
        with pytest.raises(ConnectionAbortedError):
            run(tmp_path / "cut", **UNUSUAL)
    run(tmp_path / "cut", **UNUSUAL)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_evolution_learns_along_the_deployed_steps_without_any_backward_pass(tmp_path, monkeypatch):
    """Along a zeroth-order trajectory the model moves by the step that the objective has seen."""

    def refused(*_: Any) -> float:
        raise AssertionError("a backward pass through the model")

    for place in ("walk", "statistics", "curvature", "trajectory"):
        monkeypatch.setattr(f"l2l.meta.{place}.consume_gradients", refused)
    tuner = run(
        tmp_path, objective="evolution", objective_args={"population": 1, "steps": 1}, trajectory="zo", restart_every=9
    )
    fresh = l2l.Tuner.for_model(l2l.load_model("l2l/tiny")).network
    assert any(not torch.equal(a, b) for a, b in zip(tuner.network.parameters(), fresh.parameters(), strict=True))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["trajectory_loss"] for row in rows] == [row["train_loss"] for row in rows]


def test_the_zeroth_order_trajectory_is_the_run_that_fine_tuning_would_do(tmp_path):
    from dataclasses import asdict

    from l2l.meta.module import MetaLearner
    from l2l.meta.run import prepare_meta_training
    from l2l.noise import Key
    from l2l.optim import zo_step
    from l2l.report.run_directory import RunDirectory

    config = MetaTrainConfig(**{**TINY, "trajectory": "zo", "lr": 1e-3, "tasks": ["world_job"], "restart_every": 9})
    ends = []
    for own in (True, False):
        parts = prepare_meta_training(config, None, None)
        learner = MetaLearner(parts, config, RunDirectory(str(tmp_path / "out"), asdict(config)))
        history, feeder = learner.histories[0], parts.pool[0].feeder
        for step in range(3):
            if own:
                outcome, closure = learner.outer_loss(step)
                learner.travel(step, closure, outcome)
            else:
                closure = learner.point(step, 0, step).closure
                rates = [config.lr] * len(learner.theta.blocks)
                history, _ = zo_step(closure, learner.theta, learner.method, history, Key(0, step), rates)
        assert feeder.batch_size == 2
        ends.append(weights(parts.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, weights(l2l.load_model("l2l/tiny"))[name]) for name, value in ends[0].items())


def test_a_mixture_gives_whole_periods_to_either_kind_by_the_seed():
    config = TrajectoryConfig(restart_every=3, kind="mixture", zo_share=0.25)
    kinds = [config.zeroth_order(step, seed=1) for step in range(3 * 400)]
    assert all(len(set(kinds[start : start + 3])) == 1 for start in range(0, len(kinds), 3))
    assert sum(kinds) / len(kinds) == pytest.approx(0.25, abs=0.08)
    assert kinds != [config.zeroth_order(step, seed=2) for step in range(len(kinds))]
    assert not TrajectoryConfig().zeroth_order(0, 0) and TrajectoryConfig(kind="zo").zeroth_order(0, 0)


def test_drawn_tasks_follow_their_weights_and_no_batch_is_passed_over():
    found = [drawn(step, (3.0, 0.0, 1.0), seed=5) for step in range(5000)]
    counts = Counter(task for task, _ in found)
    assert counts[1] == 0
    assert counts[0] / len(found) == pytest.approx(0.75, abs=0.03)
    assert [number for task, number in found if task == 2] == list(range(counts[2]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"objective": "evolution"},
            "takes no backward pass .* set trajectory to 'zo', or trajectory_gradient to 'own'",
        ),
        ({"objective": "best"}, "unknown objective 'best'"),
        ({"objective_args": {"steps": 2}}, "objective_args of 'published'.*its arguments are: none"),
        ({"trajectory": "random"}, "trajectory='random' must be"),
        ({"zo_share": 1.5}, "zo_share=1.5 must lie between 0 and 1"),
        ({"sampling": "both"}, "sampling='both' must be"),
        ({"task_weights": [1.0, 2.0]}, "set sampling to 'random'"),
        ({"task_weights": [1.0], "sampling": "random"}, "task_weights has 1 values for 2 tasks"),
        ({"task_weights": [-1.0, 1.0], "sampling": "random"}, r"task_weights=\[-1.0, 1.0\] must be finite"),
        ({"outer_optimizer": "lion"}, "outer_optimizer='lion' must be"),
        ({"normalizer": "budget"}, "normalizer='budget' must be one of energy, curvature, none"),
        ({"normalizer": "none", "normalise": False}, "normalise is off, but normalizer is 'none'"),
        ({"features": "raw"}, "unknown tuner features 'raw'"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_loaded(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        with_defaults(MetaTrainConfig(**{**TINY, **options}))
