"""The textbook loop, from its paper: what it does, and why it is not what l2l does."""

from __future__ import annotations

import pytest
import torch
from cases import Quadratic, farthest, same_bits, weights
from torch import nn

from l2l.tools.bench import textbook_step


def test_it_moves_along_the_noise_it_looked_along():
    model = Quadratic()
    start, looked = weights(model), []

    def closure() -> torch.Tensor:
        looked.append(weights(model))
        return model()

    textbook_step(list(model.parameters()), closure, seed=3, lr=0.01, epsilon=1e-2)
    torch.manual_seed(3)
    plus, minus = (sum(model_loss(look) for look in [seen]) for seen in looked)
    slope = (plus - minus) / 2e-2
    for name, value in start.items():
        noise = torch.normal(0.0, 1.0, value.shape)
        torch.testing.assert_close(looked[0][name], value + 1e-2 * noise)
        torch.testing.assert_close(looked[1][name], value - 1e-2 * noise)
        torch.testing.assert_close(weights(model)[name], value - 0.01 * slope * noise, rtol=1e-4, atol=1e-5)


def model_loss(values: dict[str, torch.Tensor]) -> float:
    model = Quadratic()
    model.load_state_dict(values, strict=False)
    return model().item()


def test_it_descends():
    model = Quadratic()
    before = model().item()
    for seed in range(60):
        textbook_step(list(model.parameters()), model, seed, lr=0.03)
    assert model().item() < 0.5 * before


def test_in_bfloat16_it_drifts_without_any_update():
    """Its restore is not exact: the reason why half precision is walked otherwise here."""
    model = nn.Linear(64, 64).to(torch.bfloat16)
    before = weights(model)
    for seed in range(20):
        textbook_step(list(model.parameters()), lambda: 1.0, seed)
    assert not same_bits(before, weights(model))
    assert farthest(before, weights(model)) < 0.1


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError):
        textbook_step(list(Quadratic().parameters()), lambda: float("nan"), 0)
