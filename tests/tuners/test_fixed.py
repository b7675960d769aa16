"""The control: a sigma that looks at nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import TiedLM

import l2l
from l2l.tuners.fixed import FixedSigma


def test_sigma_is_drawn_once_with_mean_one_and_the_spread_asked_for():
    sigma = FixedSigma(200_000, cv=0.75)(torch.zeros(200_000, 5)).detach()
    assert sigma.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (sigma.std() / sigma.mean()).item() == pytest.approx(0.75, rel=0.02)


def test_sigma_does_not_depend_on_features_and_rows_choose_from_it():
    network = FixedSigma(4, seed=1)
    assert torch.equal(network(torch.zeros(4, 5)), network(torch.ones(4, 5)))
    assert torch.equal(network(torch.zeros(2, 5), [3, 1]), network(torch.zeros(4, 5))[[3, 1]])


def test_it_trains_and_is_saved_like_any_tuner(tmp_path: Path):
    model = TiedLM()
    tuner = l2l.Tuner.for_model(model, architecture="fixed", cv=0.5)
    loaded = l2l.Tuner.from_pretrained(tuner.save_pretrained(tmp_path))
    assert torch.equal(loaded.network.get_parameter("sigma"), tuner.network.get_parameter("sigma"))
    optimizer = l2l.ZOFineTuner(model, loaded, lr=0.01)
    first = model().item()
    for _ in range(60):
        optimizer.step(model)
    assert model().item() < first
