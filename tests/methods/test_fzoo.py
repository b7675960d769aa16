"""FZOO against its paper, and where the released code is wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, farthest, same_bits, weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.fzoo import FZOO, deviation
from l2l.methods.mezo import MeZO
from l2l.noise import Distribution, Key, standard_noise
from l2l.optim import ZOOptimizer

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]


def loss_of(model: nn.Module) -> Callable[[Weights], float]:
    return lambda at: functional_call(model, at, (), tie_weights=True).item()


def dense_step(loss: Callable[[Weights], float], at: Weights, step: int, method: FZOO) -> Weights:
    """theta - lr * sum c_i u_i, with everything written out."""
    us = [
        {n: standard_noise(n, Key(SEED, step, i), v.shape, method.distribution, torch.float64) for n, v in at.items()}
        for i in range(method.num_directions)
    ]
    home = loss(at)
    losses = [loss({n: v + method.epsilon * u[n] for n, v in at.items()}) for u in us]
    spread = statistics.pstdev(losses)
    for seen, u in zip(losses, us, strict=True):
        c = (seen - home) / (method.num_directions * spread)
        at = {n: v - LR * c * u[n] for n, v in at.items()}
    return at


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("num_directions", [2, 8])
@pytest.mark.parametrize("make", [Quadratic, LogisticRegression, TiedLM])
def test_it_takes_the_steps_of_the_paper(make: type[nn.Module], num_directions: int, distribution: Distribution):
    model, method = make().double(), FZOO(EPSILON, num_directions, distribution)
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, method, LR, SEED)
    for step in range(20):
        optimizer.step(model)
        at = dense_step(loss, at, step, method)
        assert farthest(weights(model), at) < 1e-6


def test_probes_share_one_loss_at_theta_and_each_step_has_all_of_them_anew():
    model = TiedLM()
    optimizer = ZOOptimizer(model, FZOO(num_directions=5), 1e-3, SEED)
    keys = set()
    for step in range(3):
        optimizer.step(model)
        assert optimizer.report is not None and optimizer.report.passes == 6
        assert len({seen.loss_center for seen in optimizer.report.estimates}) == 1
        keys |= {seen.direction.key for seen in optimizer.report.estimates}
        assert len(keys) == 5 * (step + 1)


def test_directions_are_plus_or_minus_one_in_every_coordinate_by_default():
    model, seen = TiedLM().double(), []
    start = weights(model)

    def watched() -> Tensor:
        seen.append(weights(model))
        return model()

    ZOOptimizer(model, FZOO(EPSILON, 2), 1e-9, SEED).step(watched)
    for look in seen[1:]:
        for name, value in look.items():
            torch.testing.assert_close((value - start[name]).abs(), torch.full_like(value, EPSILON), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_step_does_not_depend_on_the_size_of_the_loss(scale: float):
    plain, scaled = TiedLM().double(), TiedLM().double()
    left, right = ZOOptimizer(plain, FZOO(), LR, SEED), ZOOptimizer(scaled, FZOO(), LR, SEED)
    for _ in range(5):
        left.step(plain)
        right.step(lambda: scale * scaled() + 7)
    assert farthest(weights(plain), weights(scaled)) < 1e-8


def test_along_a_linear_loss_it_is_sgd_along_the_same_directions_divided_by_the_spread():
    slopes = torch.linspace(-2, 3, 12, dtype=torch.float64)

    def linear() -> tuple[nn.Linear, Callable[[], Tensor]]:
        model = nn.Linear(12, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        return model, lambda: (model.weight[0] * slopes).sum()

    (model, closure), (other, again) = linear(), linear()
    optimizer = ZOOptimizer(model, FZOO(num_directions=4), LR, SEED)
    optimizer.step(closure)
    assert optimizer.report is not None
    spread = deviation([seen.projected_gradient for seen in optimizer.report.estimates])
    ZOOptimizer(other, MeZO(num_directions=4, distribution="rademacher"), LR / spread, SEED).step(again)
    assert farthest(weights(model), weights(other)) < 1e-9


def test_no_step_is_taken_where_all_probes_have_one_loss():
    model = Quadratic()
    start = weights(model)
    optimizer = ZOOptimizer(model, FZOO(), LR, SEED)
    for _ in range(3):
        assert optimizer.step(lambda: model() * 0 + 1) == 1
    assert farthest(weights(model), start) < 1e-6
    exact = Quadratic()
    ZOOptimizer(exact, FZOO(), LR, SEED, perturb="functional").step(lambda: exact() * 0 + 1)
    assert same_bits(weights(exact), start)


def test_a_loss_that_is_not_a_number_is_raised_not_masked():
    model, losses = Quadratic(), iter([1.0, 1.0, math.nan])
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        ZOOptimizer(model, FZOO(), LR, SEED).step(lambda: next(losses))


def test_the_deviation_is_that_over_all():
    values = [0.3, 1.7, -2.2, 5.0]
    assert deviation(values) == pytest.approx(statistics.pstdev(values), rel=1e-15)
    assert math.isnan(deviation([1.0, math.nan]))


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="num_directions=1 must be at least 2"):
        FZOO(num_directions=1)
    with pytest.raises(ValueError, match="num_directions=0 must be a whole number"):
        FZOO(num_directions=0)
    with pytest.raises(ValueError, match="epsilon=0 must be positive"):
        FZOO(epsilon=0)
    with pytest.raises(ValueError, match="lr='auto' is a share of the way"):
        ZOOptimizer(Quadratic(), FZOO(), "auto")
