"""Go or no-go on a derivative model: gain over sigma = 1 at equal passes, with an interval and a verdict."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import Here

from l2l.experiments.presets import tuner_test
from l2l.experiments.presets.tuner_test import (
    PICTURE,
    PLAIN,
    TUNER,
    GoNoGoConfig,
    judge,
    report,
    run_tuner_test,
    verdict,
)
from l2l.models.load import load_model, load_tokenizer
from l2l.models.shapes import tiny_random
from l2l.tuners.api import Tuner
from l2l.tuners.transfer import identified

pytestmark = pytest.mark.in_turn


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.3, "go"),
        (-0.3, -0.1, "no-go"),
        (-0.1, 0.2, "undecided"),
        (0.0, 0.2, "undecided"),
        (nan, nan, "undecided"),
    ],
)
def test_the_verdict_is_what_the_whole_interval_says(low: float, high: float, said: str):
    assert verdict(low, high) == said


def test_the_gain_is_paired_by_seed():
    found = judge([1.0, 2.0, 3.0], [0.9, 1.9, 2.9])
    assert found["gain"] == pytest.approx(0.1)
    assert found["interval"] == pytest.approx([0.1, 0.1])
    assert (found["verdict"], found["seeds_gained"]) == ("go", 3)
    assert judge([0.9, 1.9], [1.0, 2.0])["verdict"] == "no-go"
    assert judge([1.0, 2.0], [1.1, 1.8])["verdict"] == "undecided"


def test_a_tuner_that_diverges_where_sigma_1_does_not_never_goes():
    assert judge([1.0] * 5, [0.5, 0.5, 0.5, 0.5, inf])["verdict"] != "go"
    assert judge([1.0] * 5, [inf] * 5)["verdict"] == "no-go"
    assert judge([inf] * 2, [inf] * 2)["verdict"] == "undecided"


def test_both_have_the_same_seeds_passes_and_step_control():
    experiment = GoNoGoConfig(passes=300, seeds=3).experiment("t")
    tuned, plain = experiment.contenders
    assert (tuned.label, plain.label, tuned.method, plain.method) == (TUNER, PLAIN, "learned", "mezo")
    assert (tuned.tuner, plain.tuner, tuned.options, plain.options) == ("t", None, {"lr": "auto"}, {"lr": "auto"})
    (setting,), (scheme,) = experiment.settings, experiment.tuning_schemes
    assert experiment.points(setting, scheme, tuned) == [{"lr": "auto", "step_fraction": 0.2}]
    assert (experiment.seeds, experiment.budget(setting)["max_passes"]) == (3, 300)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 1}, "gives no interval"),
        ({"passes": 0}, "passes"),
        ({"match": "near"}, "match='near' must be one of"),
    ],
)
def test_a_test_that_makes_no_sense_is_refused(wrong: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        GoNoGoConfig(**wrong)  # pyright: ignore[reportArgumentType]


def learn_something_else(model: Any) -> None:
    """Fine-tune a few steps on one sequence of tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    tokens = torch.arange(5, 25)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def test_on_a_derivative_of_the_embedded_model_it_prints_the_gain_with_its_interval(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tuner_test, "executor_of", lambda name, processes, address=None: Here())
    model = load_model("l2l/tiny")
    own = identified(Tuner.from_pretrained("l2l-tiny"), model).save_pretrained(tmp_path / "tuner")
    learn_something_else(model)
    model.save_pretrained(tmp_path / "derivative")
    load_tokenizer("l2l/tiny").save_pretrained(tmp_path / "derivative")
    small: dict[str, Any] = {"train_size": 40, "test_size": 20, "batch_size": 4, "progress": False}
    config = GoNoGoConfig(
        tuner=str(own),
        model=str(tmp_path / "derivative"),
        out=str(tmp_path / "out"),
        passes=7,
        seeds=2,
        **small,
    )
    found = run_tuner_test(config)
    assert found["relation"].startswith("derivative: ")
    assert found["interval"][0] <= found["gain"] <= found["interval"][1]
    assert all(record["passes"] <= 7 for record in found["runs"])
    text = report(found)
    assert f"gain over sigma = 1 after 7 passes: {found['gain']:+.4f} nats" in text
    assert f"verdict: {found['verdict']}" in text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["gain"] == found["gain"]
    assert (tmp_path / "out" / PICTURE).is_file()


def test_a_tuner_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    model = tmp_path / "model"
    tiny_random("llama").save_pretrained(model)
    config = GoNoGoConfig(tuner="l2l-tiny-ratio", model=str(model), task="world_topic", out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="does not fit this model"):
        run_tuner_test(config)
    assert not (tmp_path / "out").exists()
