"""First-order baselines under the same command: same data, files, logs and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits, weights

import l2l
from l2l.costs import Load, Plan, memory_parts, model_shape
from l2l.methods.registry import declared_method
from l2l.models.shapes import tiny_random
from l2l.params import Blocks
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import Batcher
from l2l.train.trainer import prepare_fine_tuning

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    "task": "world_topic",
    "method": "adamw",
    "lr": 1e-3,
    "batch_size": 4,
    "train_size": 24,
    "dev_size": 12,
    "test_size": 12,
    "eval_every": 3,
    "checkpoint_every": 2,
    "log_every": 1,
    "progress": False,
    "save": "log",
}


def fine_tune(out: Path, **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune("l2l/tiny", out=str(out), **{**SMALL, "steps": 6, **options})


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> l2l.FineTuneResult:
    return fine_tune(tmp_path_factory.mktemp("adamw"))


def test_a_run_descends_and_leaves_the_files_of_any_run(done):
    summary = json.loads((done.out / "summary.json").read_text())
    assert summary["final_loss"] < 0.5 * summary["initial_loss"]
    assert (summary["method"], summary["steps"], summary["passes"]) == ("adamw", 6, 18)
    assert {"config.yaml", "metrics.csv", "steps.l2l", "loss.png"} <= {path.name for path in done.out.iterdir()}
    low, high = summary["best"]["test"]["interval"]
    assert low <= summary["best"]["test"]["value"] <= high


def test_it_sees_the_batches_that_zeroth_order_runs_see(tmp_path, monkeypatch):
    batch = Batcher.batch
    seen: dict[str, list[list[int]]] = {"sgd": [], "mezo": []}
    for method, indices in seen.items():
        monkeypatch.setattr(
            Batcher, "batch", lambda self, chosen, into=indices: (into.append(list(chosen)), batch(self, chosen))[1]
        )
        fine_tune(tmp_path / method, method=method, steps=2)
    assert len(seen["sgd"]) >= 2
    assert seen["sgd"] == seen["mezo"]


def test_the_bare_and_the_lightning_loop_do_the_same_bit_for_bit(done, tmp_path):
    other = fine_tune(tmp_path, loop="lightning")
    assert same_bits(weights(done.model), weights(other.model))
    assert done.summary["best"] == other.summary["best"]


def test_an_interrupted_run_is_continued_bit_for_bit(done, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("l2l.train.trainer.draw_curves", broken)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tmp_path)
    continued = fine_tune(tmp_path)
    assert continued.summary["last"] == done.summary["last"]
    assert same_bits(weights(continued.model), weights(done.model))


def test_passes_end_a_run_as_they_do_with_any_method(tmp_path):
    summary = fine_tune(tmp_path, method="sgd", steps=50, max_passes=7).summary
    assert (summary["steps"], summary["passes"]) == (3, 9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": "auto"}, "give lr as a number"),
        ({"objective": "accuracy"}, "needs the gradient of what it minimises"),
        (
            {"method_args": {"num_directions": 2}},
            "method 'adamw' has no argument 'num_directions'; it has beta1, beta2, eps",
        ),
        ({"tuner": "l2l/tiny"}, "takes no tuner"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        fine_tune(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["world_topic", "world_cause"])
@pytest.mark.parametrize("method", ["sgd", "mezo"])
def test_micro_batches_give_the_losses_of_whole_batches_up_to_rounding(task, method):
    """Of a classification loss the mean is over examples, of the lm form over tokens."""
    values = []
    for size in (None, 3):
        options = {**SMALL, "task": task, "method": method, "micro_batch": size}
        parts = prepare_fine_tuning(FineTuneConfig(model="l2l/tiny", **options))
        with torch.no_grad():
            values.append([float(parts.closures.at(step)()) for step in range(3)])
            values[-1] += [float(parts.closures.further(0, number)()) for number in range(2)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "from 1 to batch_size, which is 16"), (17, "from 1 to batch_size, which is 16")]
)
def test_a_micro_batch_that_is_none_is_refused(size, words):
    with pytest.raises(ValueError, match=words):
        FineTuneConfig(micro_batch=size)


def test_the_estimate_counts_gradients_states_and_the_activations_of_all_layers():
    model = tiny_random("llama")
    blocks, load = Blocks.of(model), Load(4, 16, 4)
    shape = model_shape(model, blocks)

    def parts(name: str) -> dict[str, int]:
        method = declared_method(name, {}, model)
        return memory_parts(shape, load, Plan.of(torch.float32, "in_place", "direct", method, blocks))

    adamw, mezo = parts("adamw"), parts("mezo")
    assert adamw["scratch"] == 4 * blocks.numel
    assert adamw["method"] == 8 * blocks.numel
    assert adamw["activations"] > mezo["activations"]
    assert mezo["scratch"] == 0
