"""Theta walks in place, comes back, and merges traversals without changing a bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import TiedLM, farthest, same_bits, weights
from torch import nn

import l2l.params.engine
from l2l.noise import Key, standard_noise
from l2l.params import Blocks, Direction, PerturbedParameters

EPSILON = 1e-3


def walker(model: nn.Module, key: Key, factor: float = 1.3) -> tuple[PerturbedParameters, Direction]:
    blocks = Blocks.of(model)
    sigma = tuple(0.1 + 0.3 * i for i in range(len(blocks)))
    return PerturbedParameters(blocks), Direction(key, sigma, factor=factor)


def test_looking_adds_distance_times_factor_times_sigma_times_noise(key: Key):
    model = TiedLM().double()
    theta, u = walker(model, key)
    before = weights(model)
    theta.perturb(u, EPSILON)
    for block, sigma in zip(theta.blocks, u.sigma, strict=True):
        z = standard_noise(block.name, key, block.tensor.shape, dtype=torch.float64)
        wanted = before[block.name] + EPSILON * 1.3 * sigma * z
        torch.testing.assert_close(block.tensor.detach(), wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_going_home_returns_within_one_rounding(dtype: torch.dtype, key: Key):
    model = TiedLM().to(dtype)
    theta, u = walker(model, key)
    before = weights(model)
    theta.perturb(u, EPSILON)
    away = weights(model)
    theta.restore()
    for name, value in weights(model).items():
        unit = torch.finfo(dtype).eps * torch.maximum(before[name].abs(), away[name].abs())
        assert ((value - before[name]).abs() <= unit).all()


def test_home_is_a_place_and_going_there_twice_changes_nothing(key: Key):
    model = TiedLM()
    theta, u = walker(model, key)
    theta.perturb(u, EPSILON)
    theta.restore()
    at_home = weights(model)
    theta.restore()
    assert same_bits(at_home, weights(model))


def test_the_merged_walk_equals_the_separate_ones_bit_for_bit(key: Key):
    merged, apart = TiedLM(), TiedLM()
    amounts = [-1e-4 * (i + 1) for i in range(len(Blocks.of(merged)))]

    theta, u = walker(merged, key)
    theta.perturb(u, EPSILON)
    theta.perturb(u, -EPSILON)
    theta.add(u, amounts)

    theta, u = walker(apart, key)
    theta.perturb(u, EPSILON)
    theta.perturb(u, -EPSILON)
    theta.restore()
    theta.add(u, amounts)
    assert same_bits(weights(merged), weights(apart))


@pytest.mark.parametrize("walks", [2, 3])
def test_a_step_along_one_direction_takes_three_traversals(walks: int, key: Key, monkeypatch: pytest.MonkeyPatch):
    model = TiedLM()
    theta, u = walker(model, key)
    names: list[str] = []
    genuine = l2l.params.engine.add_noise
    monkeypatch.setattr(
        l2l.params.engine, "add_noise", lambda p, *rest: (names.extend(one.name for one in p), genuine(p, *rest))[1]
    )
    theta.perturb(u, EPSILON)
    theta.perturb(u, -EPSILON)
    if walks == 3:
        theta.add(u, [1e-4] * len(theta.blocks))
    assert names == list(theta.blocks.names) * walks


def test_another_direction_is_looked_along_from_home(key: Key):
    model, other = TiedLM(), TiedLM()
    theta, u = walker(model, key)
    v = Direction(key.with_draw(1), u.sigma)
    theta.perturb(u, EPSILON)
    theta.perturb(v, EPSILON)

    straight, _ = walker(other, key)
    straight.perturb(v, EPSILON)
    assert farthest(weights(model), weights(other)) < 1e-6


def test_a_block_with_sigma_zero_stays_where_it_is(key: Key):
    model = TiedLM()
    theta, u = walker(model, key)
    before = weights(model)
    theta.perturb(Direction(key, (0.0, *u.sigma[1:])), EPSILON)
    after = weights(model)
    first, *others = theta.blocks.names
    assert torch.equal(before[first], after[first])
    assert all(not torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, -0.5])
def test_a_direction_with_a_broken_sigma_is_refused(sigma: float, key: Key):
    with pytest.raises(ValueError, match=f"sigma is {sigma}: it must be finite and not negative"):
        Direction(key, (1.0, sigma))


def test_a_scale_that_is_not_finite_moves_no_block(key: Key):
    model = TiedLM()
    theta, u = walker(model, key)
    before = weights(model)
    with pytest.raises(ValueError, match="noise scale is nan"):
        theta.add(u, [1e-3] * (len(theta.blocks) - 1) + [math.nan])
    assert same_bits(before, weights(model))


def test_an_unknown_distribution_moves_no_block(key: Key):
    model = TiedLM()
    theta, u = walker(model, key)
    before = weights(model)
    unknown: Any = "uniform"
    with pytest.raises(ValueError, match="distribution='uniform'"):
        theta.perturb(Direction(key, u.sigma, unknown), EPSILON)
    assert same_bits(before, weights(model))


@pytest.mark.parametrize("ratio", [1.0, 0.8, 1.2, 0.0])
def test_interpolating_sets_blocks_on_the_line_from_the_anchor(ratio: float, key: Key):
    model = TiedLM().double()
    theta, u = walker(model, key)
    anchor = {0: theta.blocks[0].tensor.detach().clone()}
    theta.add(u, [0.1] * len(theta.blocks))
    before = weights(model)
    here = {0: theta.blocks[0].tensor.detach().clone()}
    theta.interpolate(anchor, here, {0: ratio})
    torch.testing.assert_close(theta.blocks[0].tensor.detach(), anchor[0] + ratio * (here[0] - anchor[0]))
    assert all(torch.equal(before[name], weights(model)[name]) for name in theta.blocks.names[1:])


def test_ratio_one_is_here_bit_for_bit_whatever_stood_there_between(key: Key):
    model = TiedLM()
    theta, u = walker(model, key)
    anchor = {i: block.tensor.detach().clone() for i, block in enumerate(theta.blocks)}
    theta.add(u, [0.1] * len(theta.blocks))
    before = weights(model)
    here = {i: block.tensor.detach().clone() for i, block in enumerate(theta.blocks)}
    for ratio in (0.7, 1.3, 1.0):
        theta.interpolate(anchor, here, dict.fromkeys(anchor, ratio))
    assert same_bits(before, weights(model))


def test_four_hundred_steps_without_learning_drift_less_than_two_millionths():
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.copy_(0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    theta = PerturbedParameters(Blocks.of(model))
    before = weights(model)
    for step in range(400):
        u = Direction(Key(0, step), (1.0, 1.0))
        with theta.step():
            theta.perturb(u, EPSILON)
            theta.perturb(u, -EPSILON)
            theta.add(u, [1e-30, 1e-30])
    after = weights(model)
    drift = torch.linalg.vector_norm(after["weight"] - before["weight"]) / torch.linalg.vector_norm(before["weight"])
    assert drift < 2e-6
