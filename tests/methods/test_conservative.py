"""ZO-SGD-Cons: against dense steps, and against what the benchmark's code gets wrong."""

from __future__ import annotations

import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from dense_steps import (
    EPSILON,
    LR,
    SEED,
    Loss,
    Weights,
    assert_near,
    assert_same_run,
    loss_of,
    moved,
    normal,
    two_sided,
)
from torch import Tensor, nn

from l2l.methods.conservative import Conservative
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


def dense_step(loss: Loss, at: Weights, key: Key, num_directions: int = 1, lr: float = LR) -> Weights:
    """The best of theta, theta - lr g u and theta + lr g u."""
    us = [{n: normal(n, key.with_draw(j), *value.shape) for n, value in at.items()} for j in range(num_directions)]
    gs = [two_sided(loss, at, u) for u in us]
    down, up = at, at
    for g, u in zip(gs, us, strict=True):
        down, up = moved(down, -lr * g / num_directions, u), moved(up, lr * g / num_directions, u)
    return min((at, down, up), key=loss)


@pytest.mark.parametrize("num_directions", [1, 3])
def test_it_takes_the_steps_of_the_paper(model: nn.Module, num_directions: int):
    assert_same_run(
        model, Conservative(EPSILON, num_directions), lambda loss, at, key: dense_step(loss, at, key, num_directions)
    )


def test_at_a_rate_that_overshoots_at_times_it_stays_then_and_never_climbs():
    model = Quadratic().double()
    loss, at, lr, chosen = loss_of(model), weights(model), 0.075, set()
    optimizer = ZOOptimizer(model, Conservative(EPSILON), lr, SEED)
    for step in range(30):
        before = at
        at = dense_step(loss, at, Key(SEED, step), lr=lr)
        optimizer.step(model)
        assert_near(weights(model), at)
        assert loss(at) <= loss(before)
        chosen.add(at is before)
    assert chosen == {True, False}


def test_up_is_chosen_where_the_estimate_points_the_wrong_way():
    """A loss with its bottom beyond a ridge: the slope between both sides is not that of the step."""

    class Ridge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))

        def forward(self) -> Tensor:
            w = self.weight[0]
            return 0.1 * w - w * w * torch.sign(w) * 5

    found = set()
    for seed in range(6):
        model = Ridge()
        loss, at = loss_of(model), weights(model)
        optimizer = ZOOptimizer(model, Conservative(1e-3), 10.0, seed)
        optimizer.step(model)
        assert_near(weights(model), dense_step(loss, at, Key(seed), lr=10.0))
        found.add(bool(model.weight > 0))
    assert found == {True}, "down lies at negative weights, where the loss is above that at theta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_candidates_that_lose_leave_no_trace(dtype: torch.dtype):
    """The code steps back by the opposite step, and rounds twice."""
    model = TiedLM().to(dtype)
    optimizer = ZOOptimizer(model, Conservative(), 1e4, SEED, perturb="functional")
    before = weights(model)
    for _ in range(3):
        optimizer.step(lambda: model().float())
    assert same_bits(before, weights(model))


def test_weight_decay_comes_after_the_choice():
    """The code's undoing of a decayed step is another step."""
    model = TiedLM().double()
    optimizer = ZOOptimizer(model, Conservative(), 1e4, SEED, weight_decay=1e-5)
    before = weights(model)
    optimizer.step(model)
    wanted = {name: value * (0.9 if value.ndim > 1 else 1.0) for name, value in before.items()}
    assert_near(weights(model), wanted)


def test_the_loss_it_reports_is_not_that_of_a_candidate_that_lost():
    model = TiedLM().double()
    at_theta = model().item()
    optimizer = ZOOptimizer(model, Conservative(), 1e4, SEED)
    assert optimizer.step(model) == pytest.approx(at_theta, rel=1e-3)
    assert optimizer.report is not None
    assert optimizer.report.estimates[0].loss_center == pytest.approx(at_theta, rel=1e-12)


def test_where_every_step_down_is_the_best_it_is_mezo():
    left, right = Quadratic().double(), Quadratic().double()
    one, other = ZOOptimizer(left, Conservative(), 1e-3, SEED), ZOOptimizer(right, MeZO(), 1e-3, SEED)
    for _ in range(10):
        one.step(left)
        other.step(right)
        assert_near(weights(left), weights(right))


@pytest.mark.parametrize("seed", range(4))
def test_blocks_with_their_own_rates_are_tried_and_moved_by_them(seed: int):
    """With rates of their own, a step against the slope along u need not descend: either side may be the best."""
    model = Quadratic().double()
    loss, at, rates = loss_of(model), weights(model), {"matrix": 1e-3, "vector": 1e-4}
    u = {name: normal(name, Key(seed), *value.shape) for name, value in at.items()}
    g = two_sided(loss, at, u)
    step = {name: rates[name] * g * u[name] for name in at}
    ZOOptimizer(model, Conservative(), 1e-3, seed, groups=[{"match": "vector", "lr": 1e-4}]).step(model)
    assert_near(weights(model), min((at, moved(at, -1, step), moved(at, 1, step)), key=loss))


@pytest.mark.parametrize(("num_directions", "passes"), [(1, 5), (2, 7)])
def test_both_candidates_and_theta_are_counted(num_directions: int, passes: int):
    model = Quadratic()
    optimizer = ZOOptimizer(model, Conservative(num_directions=num_directions), LR)
    optimizer.step(model)
    assert optimizer.report is not None
    assert optimizer.report.passes == Conservative(num_directions=num_directions).passes == passes


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="num_directions=0 must be a whole number"):
        Conservative(num_directions=0)
