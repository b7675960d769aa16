"""ZO-SGD-Sign: both readings against dense steps, and where they meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, Loss, Weights, assert_near, assert_same_run, moved, normal, run, two_sided
from torch import nn

from l2l.methods.sign import Sign, sign
from l2l.noise import Key
from l2l.optim import ZOOptimizer


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


def seen(loss: Loss, at: Weights, key: Key, num_directions: int) -> list[tuple[float, Weights]]:
    """g and u of every draw."""
    us = [{n: normal(n, key.with_draw(j), *value.shape) for n, value in at.items()} for j in range(num_directions)]
    return [(two_sided(loss, at, u), u) for u in us]


@pytest.mark.parametrize("num_directions", [1, 3])
def test_the_elementwise_reading_takes_the_sign_of_every_coordinate_of_the_mean(model: nn.Module, num_directions: int):
    def dense(loss: Loss, at: Weights, key: Key) -> Weights:
        found = seen(loss, at, key, num_directions)
        mean = {name: torch.stack([g * u[name] for g, u in found]).mean(0) for name in at}
        return {name: value - LR * mean[name].sign() for name, value in at.items()}

    assert_same_run(model, Sign(EPSILON, num_directions), dense)


@pytest.mark.parametrize("num_directions", [1, 3])
def test_the_scalar_reading_takes_the_sign_of_each_projected_gradient(model: nn.Module, num_directions: int):
    def dense(loss: Loss, at: Weights, key: Key) -> Weights:
        for g, u in seen(loss, at, key, num_directions):
            at = moved(at, -LR * (1 if g > 0 else -1) / num_directions, u)
        return at

    assert_same_run(model, Sign(EPSILON, num_directions, reading="scalar"), dense)


def test_along_rademacher_noise_the_two_readings_are_one(model: nn.Module):
    other = type(model)().double()
    run(model, Sign(EPSILON, distribution="rademacher"), 20)
    run(other, Sign(EPSILON, distribution="rademacher", reading="scalar"), 20)
    assert_near(weights(model), weights(other))


@pytest.mark.parametrize("reading", ["element", "scalar"])
def test_the_length_of_a_step_does_not_depend_on_the_unit_of_the_loss(reading: Any):
    left, right = Quadratic().double(), Quadratic().double()
    one, other = (ZOOptimizer(m, Sign(EPSILON, reading=reading), LR) for m in (left, right))
    for _ in range(5):
        one.step(left)
        other.step(lambda: 1000 * right())
    assert_near(weights(left), weights(right))


@pytest.mark.parametrize("reading", ["element", "scalar"])
def test_where_there_is_no_slope_nothing_moves(reading: Any):
    model = Quadratic().double()
    before = weights(model)
    ZOOptimizer(model, Sign(reading=reading), LR).step(lambda: torch.tensor(1.0))
    assert_near(weights(model), before)
    assert [sign(value) for value in (-2.0, -0.0, 3.0)] == [-1, 0, 1]


def test_the_default_is_the_reading_of_the_papers_and_says_whether_it_leaves_the_directions():
    assert Sign() == Sign(reading="element")
    assert Sign().leaves_span and not Sign(reading="scalar").leaves_span


def test_another_reading_and_lr_auto_are_refused():
    bad: Any = "both"
    with pytest.raises(ValueError, match="reading='both' must be one of scalar, element"):
        Sign(reading=bad)
    with pytest.raises(ValueError, match="give lr as a number"):
        ZOOptimizer(Quadratic(), Sign(), "auto")
