"""All objectives alike: where they leave theta, what they return, and how they are named."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from bowl import Bowl, basis, close, meta_gradient, point_on, tuner_of, weights_of
from torch import Tensor

from l2l.meta.config import MetaTrainConfig
from l2l.meta.objectives import OBJECTIVES, make_objective
from l2l.noise import Key

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("one_step_loss", {}),
    ("held_out_loss", {}),
    ("expected", {}),
    ("expected", {"keep": False}),
    ("expected_curvature", {"trace": "fisher"}),
    ("expected_curvature", {"trace": "hutchinson", "probes": 2}),
    ("expected_curvature", {"trace": "seen"}),
    ("log_progress_rate", {}),
    ("unrolled_loss", {"steps": 3}),
    ("evolution", {"population": 1, "steps": 2}),
    ("es_full_run", {"population": 1, "steps": 3}),
]


each = pytest.mark.parametrize(("name", "args"), VARIANTS, ids=lambda value: str(value))


def test_every_objective_of_the_package_is_tried_here():
    assert {name for name, _ in VARIANTS} == set(OBJECTIVES)


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
@each
def test_theta_and_tuner_are_where_they_were(name: str, args: dict[str, Any], inside: Tensor | None):
    model = Bowl()
    tuner = tuner_of(model, inside)
    before, weights = weights_of(model), weights_of(tuner.network)
    outcome = make_objective(name, **args)(point_on(model, tuner))
    assert close(model, before)
    assert all(torch.equal(p, kept) for p, kept in zip(tuner.network.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.any(meta_gradient(outcome, tuner.network) != 0)
    assert torch.isfinite(torch.tensor([outcome.value, outcome.loss])).all()


@each
def test_theta_and_tuner_are_where_they_were_after_an_error_at_any_evaluation(name: str, args: dict[str, Any]):
    model = Bowl()
    tuner = tuner_of(model)
    before, weights = weights_of(model), weights_of(tuner.network)
    objective = make_objective(name, **args)
    fatal = -1
    for fatal in itertools.count():
        calls = itertools.count()

        def loss(batch: int, calls: Any = calls, fatal: int = fatal) -> Tensor:
            if next(calls) == fatal:
                raise RuntimeError("out of memory")
            return model(batch)

        point = replace(
            point_on(model, tuner),
            closure=lambda loss=loss: loss(0),
            other=lambda loss=loss: loss(1),
            further=lambda i, loss=loss: lambda: loss(2 + i),
        )
        try:
            objective(point)
        except RuntimeError:
            assert close(model, before)
            assert all(torch.equal(p, kept) for p, kept in zip(tuner.network.parameters(), weights, strict=True))
            assert all(parameter.grad is None for parameter in model.parameters())
        else:
            break
    assert fatal >= 3


@each
def test_an_objective_hands_on_one_gradient_of_every_block_or_says_that_it_has_none(name: str, args: dict[str, Any]):
    model = Bowl()
    seen: list[int] = []
    objective = make_objective(name, **args)
    outcome = objective(point_on(model, tuner_of(model), consume=lambda index, gradient: seen.append(index)))
    assert sorted(seen) == ([0, 1] if objective.hands_gradients else [])
    assert outcome.report.key == Key(5, 7)
    assert outcome.history.step == 1


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("one_step_lss", {}, "unknown objective 'one_step_lss'.*did you mean 'one_step_loss'"),
        ("unrolled_loss", {"step": 3}, r"objective_args of 'unrolled_loss'.*its arguments are: steps"),
        ("unrolled_loss", {"steps": 0}, "steps=0 must be a whole number"),
        ("evolution", {"scale": 0.0}, "scale=0.0 must be positive"),
        ("log_progress_rate", {"decay": 1.0}, "decay=1.0 must be at least 0 and below 1"),
        ("expected_curvature", {"trace": "exact"}, "trace='exact' must be one of fisher, hutchinson, seen"),
        ("no.such_module", {}, "no module 'no.such_module' can be imported"),
        ("l2l.meta.trajectory", {}, "defines 0 objectives"),
    ],
)
def test_a_wrong_objective_is_refused_with_a_way_out(name: str, args: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        make_objective(name, **args)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("published", "one_step_loss"),
        ("held_out", "held_out_loss"),
        ("unrolled", "unrolled_loss"),
        ("ratio", "log_progress_rate"),
        ("runs", "es_full_run"),
    ],
)
def test_an_objective_is_found_under_its_old_name_with_one_warning(old: str, name: str):
    with pytest.warns(FutureWarning, match=f"objective='{old}' is now called '{name}'") as said:
        config = MetaTrainConfig(objective=old, trajectory="zo")
    assert len(said) == 1
    assert config.objective == name
    assert type(config.make_objective()) is OBJECTIVES[name]


def test_an_objective_outside_the_package_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text(
        "from l2l.meta.state import Objective\n"
        "class Mine(Objective):\n"
        "    def __call__(self, point):\n"
        "        raise FloatingPointError('mine')\n"
    )
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_objective.py").rename(tmp_path / "my_package" / "my_objective.py")
    monkeypatch.syspath_prepend(tmp_path)
    objective = MetaTrainConfig(objective="my_package.my_objective").make_objective()
    with pytest.raises(FloatingPointError, match="mine"):
        objective(point_on(Bowl(), tuner_of(Bowl())))
