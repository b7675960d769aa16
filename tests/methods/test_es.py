"""Evolution strategies against their papers, with everything written out; and as what they reduce to."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, farthest, same_bits, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run
from torch import nn

from l2l.methods.es import ES, centered_ranks, z_scores
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, dense_direction

pytestmark = pytest.mark.in_turn

N = 5


def noise(at: Weights, key: Key, rank: int) -> Weights:
    """Plain, or A B^T / sqrt(r) in matrices."""

    def low_rank(name: str, value: torch.Tensor) -> torch.Tensor:
        a, b = normal(f"{name}#rows", key, len(value), rank), normal(f"{name}#columns", key, value[0].numel(), rank)
        return (a @ b.T / math.sqrt(rank)).view(value.shape)

    whole = {name: value.ndim == 1 or not rank for name, value in at.items()}
    return {n: normal(n, key, *v.shape) if whole[n] else low_rank(n, v) for n, v in at.items()}


def ranks(values: list[float]) -> list[float]:
    """Salimans: places of distinct values, divided by their number less one, less a half."""
    return [sorted(values).index(value) / (len(values) - 1) - 0.5 for value in values]


def scores(values: list[float]) -> list[float]:
    return [(value - statistics.fmean(values)) / statistics.pstdev(values) for value in values]


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize(("shaping", "shaped"), [("z_score", scores), ("centered_ranks", ranks)])
@pytest.mark.parametrize("make", [Quadratic, LogisticRegression, TiedLM])
def test_it_takes_the_steps_of_the_papers(make: type[nn.Module], antithetic: bool, rank: int, shaping: Any, shaped: Any):
    def step(loss: Loss, at: Weights, key: Key) -> Weights:
        us = [noise(at, key.with_draw(draw), rank) for draw in range(N)]
        members = [(sign, u) for sign in ((1, -1) if antithetic else (1,)) for u in us]
        fitness = shaped([loss(moved(at, sign * EPSILON, u)) for sign, u in members])
        for (sign, u), weight in zip(members, fitness, strict=True):
            at = moved(at, -LR / len(members) * weight * sign, u)
        return at

    method = ES(EPSILON, N, antithetic=antithetic, rank=rank, shaping=shaping)
    assert_same_run(make().double(), method, step, steps=6)


def test_a_population_takes_a_pass_for_each_member():
    for method, passes in ((ES(num_directions=4), 8), (ES(num_directions=4, antithetic=False), 4)):
        model = TiedLM()
        optimizer = run(model, method, steps=1)
        assert optimizer.report is not None
        assert optimizer.report.passes == method.passes == passes
        assert len(optimizer.report.estimates) == 4


def test_of_one_mirrored_pair_it_is_a_step_of_length_lr_down_the_direction_of_mezo():
    model, other = TiedLM().double(), TiedLM().double()
    start = weights(model)
    run(model, ES(EPSILON, num_directions=1), steps=1)
    mezo = run(other, MeZO(EPSILON), steps=1)
    assert mezo.report is not None
    length = abs(mezo.report.projected_gradient)  # z-scores of two members are 1 and -1
    assert_near(weights(model), {n: w + (weights(other)[n] - w) / length for n, w in start.items()}, 1e-6, 1e-10)


def test_a_mirrored_pair_of_equal_losses_adds_nothing():
    model = Quadratic()
    with torch.no_grad():
        model.matrix.fill_(1)
        model.vector.fill_(-2)  # the minimum: a parabola in every direction
    start = weights(model)
    run(model.double(), ES(1e-2), steps=1)
    assert farthest({n: w.double() for n, w in start.items()}, weights(model)) < 1e-9


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("shaping", ["z_score", "centered_ranks"])
def test_no_step_is_taken_where_all_members_have_one_loss(antithetic: bool, shaping: Any):
    model = Quadratic()
    start = weights(model)
    optimizer = ZOOptimizer(model, ES(antithetic=antithetic, shaping=shaping), LR, SEED, perturb="functional")
    assert optimizer.step(lambda: model() * 0 + 1) == 1
    assert same_bits(weights(model), start)


def test_the_unit_of_the_loss_does_not_matter():
    model, other = TiedLM().double(), TiedLM().double()
    run(model, ES(EPSILON, N))
    optimizer = ZOOptimizer(other, ES(EPSILON, N), LR, SEED)
    for _ in range(10):
        optimizer.step(lambda: 1000 * other())
    assert_near(weights(model), weights(other), 1e-6, 1e-9)


def test_the_noise_in_a_matrix_has_the_rank_that_is_asked_for_and_mean_square_one():
    blocks, index = Blocks.of(TiedLM()), Blocks.of(TiedLM()).names.index("attention.qkv.weight")
    for rank in (1, 2):
        method = ES(rank=rank)
        us = [dense_direction(method.direction(blocks, None, Key(SEED, step)), blocks, index) for step in range(100)]
        assert torch.linalg.matrix_rank(us[0]) == rank
        assert torch.linalg.matrix_rank(us[0] + us[1]) == 2 * rank
        assert torch.stack(us).square().mean().item() == pytest.approx(1, rel=0.1)


def test_shapings():
    assert z_scores([1.0, 3.0]) == [-1.0, 1.0]
    assert z_scores([2.0, 2.0]) == [0.0, 0.0]
    assert math.isnan(z_scores([1.0, math.nan])[0])
    assert centered_ranks([3.0, -1.0, 10.0]) == [0.0, -0.5, 0.5]
    assert centered_ranks([1.0, 0.0, 1.0]) == [0.25, -0.5, 0.25]
    assert centered_ranks([7.0, 7.0, 7.0]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_directions": 1, "antithetic": False}, "a population of one: use at least 2, or antithetic"),
        ({"rank": -1}, "rank=-1 must be a whole number, at least 0"),
        ({"shaping": "raw"}, "shaping='raw' must be one of z_score, centered_ranks"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        ES(**wrong)


def test_auto_is_refused():
    with pytest.raises(ValueError, match="lr='auto' is a share of the way"):
        ZOOptimizer(Quadratic(), ES(), "auto")
