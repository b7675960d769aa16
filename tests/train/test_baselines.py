"""Baselines that take no steps: zero-shot, in-context, linear probe. They end in the files of a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits, weights

import l2l
from l2l.methods import method_names
from l2l.models.load import load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.rows import load_splits
from l2l.train.baselines import baseline_names, build_baseline
from l2l.train.baselines.icl import with_demonstrations
from l2l.train.baselines.linear_probe import Features, fit

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {"task": "world_topic", "train_size": 40, "dev_size": 20, "test_size": 20, "progress": False}


def measured(out: Path, method: str, **options: Any) -> dict[str, Any]:
    return l2l.fine_tune("l2l/tiny", out=str(out), method=method, **{**SMALL, **options}).summary


def test_no_baseline_has_the_name_of_a_method():
    assert baseline_names() == ["icl", "linear_probe", "zero_shot"]
    assert not set(baseline_names()) & set(method_names())


@pytest.mark.parametrize("method", ["zero_shot", "icl", "linear_probe"])
def test_the_summary_has_the_fields_of_a_run_and_the_model_is_as_it_came(method, tmp_path):
    model = l2l.load_model("l2l/tiny")
    before = weights(model)
    result = l2l.fine_tune(model, out=str(tmp_path / "a"), method=method, **SMALL)
    run = l2l.fine_tune("l2l/tiny", out=str(tmp_path / "b"), steps=1, save="log", **SMALL).summary
    assert run.keys() <= result.summary.keys()
    assert run["best"]["test"].keys() == result.summary["best"]["test"].keys()
    assert same_bits(before, weights(model))
    assert json.loads((result.out / "summary.json").read_text())["steps"] == 0
    with (result.out / "metrics.csv").open() as file:
        assert float(next(csv.DictReader(file))["dev_loss"]) == result.summary["best"]["dev"]["loss"]


def test_zero_shot_is_what_a_run_begins_with(tmp_path):
    found = measured(tmp_path / "a", "zero_shot")
    run = measured(tmp_path / "b", "mezo", steps=1, save="log")
    assert found["initial_loss"] == found["final_loss"] == run["initial_loss"]
    assert found["passes"] == found["trained_parameters"] == 0


def test_demonstrations_stand_before_the_prompt_with_their_answers():
    task, tokenizer = get_task("world_topic"), load_tokenizer("l2l/tiny")
    splits = load_splits(task, None, 3, 1, 1)
    shown, fitting = with_demonstrations(task, splits.train, tokenizer, room=10_000)
    row = splits.test[0]
    *demonstrations, prompt = shown.example(row).prompt.split("\n\n")
    plain = [task.example(train) for train in splits.train]
    assert demonstrations == [(e.prompt + e.options[e.gold[0]]).strip() for e in plain]
    assert prompt == task.example(row).prompt
    assert fitting(row) == 3


def test_demonstrations_that_do_not_fit_are_left_out_whole_and_the_note_says_so(tmp_path):
    task, tokenizer = get_task("world_topic"), load_tokenizer("l2l/tiny")
    rows = load_splits(task, None, 6, 1, 1).train
    shown, fitting = with_demonstrations(task, rows, tokenizer, room=60)
    count = fitting(rows[0])
    assert 0 < count < 6
    prompt = shown.example(rows[0]).prompt
    assert prompt.count("\n\n") == count
    longest = max(shown.example(rows[0]).options, key=len)
    assert len(tokenizer(prompt + longest)["input_ids"]) <= 60
    found = measured(tmp_path, "icl", method_args={"shots": 20})
    assert found["baseline"]["shots_mean"] < 20
    assert found["note"].startswith("of 20 demonstrations ")


def test_the_probe_finds_what_is_linear_in_the_hidden_states(tmp_path):
    found = measured(tmp_path, "linear_probe")
    assert found["accuracy"] > 0.8
    assert found["trained_parameters"] == (found["baseline"]["features"] + 1) * found["baseline"]["classes"]


def test_a_stronger_penalty_gives_smaller_weights_and_the_gradient_at_the_fit_is_zero():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(60, 5, generator=draw, dtype=torch.float64)
    classes = (states[:, 0] + 0.5 * torch.randn(60, generator=draw, dtype=torch.float64) > 0).long()
    weak, strong = (fit(Features(states, classes), 2, strength) for strength in (1e-2, 1.0))
    assert strong.weight.norm() < weak.weight.norm()
    weight = weak.weight.clone().requires_grad_()
    scaled = (states - weak.mean) / weak.spread
    loss = torch.nn.functional.cross_entropy(scaled @ weight + weak.bias, classes) + 0.5e-2 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("linear_probe", {"task": "world_cause"}, "same options for every row, and those of task 'world_cause' differ"),
        ("icl", {"method_args": {"shots": 0}}, "shots=0 must be a whole number"),
        ("icl", {"method_args": {"shot": 1}}, "method 'icl' has no argument 'shot'; it has shots"),
        ("zero_shot", {"method_args": {"x": 1}}, "has no argument 'x'; it has none"),
        ("zero_shot", {"tuner": "l2l/tiny"}, "takes no tuner"),
        ("zero_shot", {"objective": "accuracy"}, "trains nothing"),
        ("linear_probe", {"method_args": {"strengths": [1.0, -1.0]}}, "strengths=-1.0 must be positive"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_written(tmp_path, method, options, words):
    with pytest.raises(ValueError, match=words):
        measured(tmp_path / "run", method, **options)
    assert not (tmp_path / "run").exists()


def test_a_baseline_is_built_with_its_arguments():
    assert vars(build_baseline("icl", {"shots": 4})) == {"shots": 4}
