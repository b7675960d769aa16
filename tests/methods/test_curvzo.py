"""CurvZO against its paper's step, dense; and that its estimate is right on average, whatever blocks are sampled."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from torch import nn
from torch.func import functional_call

from l2l.methods.curvzo import CurvZO, CurvZOState, adapt_budget, inclusion, sample_blocks
from l2l.methods.mezo import MeZO
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.params import Blocks

LR, EPSILON, SEED = 0.01, 1e-3, 4


def dense_inclusion(s: list[float], budget: float, mixture: float) -> list[float]:
    count, total = len(s), sum(s)
    p = [mixture * value / total + (1 - mixture) / count for value in s]
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1, c * x) for x in p) < max(1, budget * count) else (low, c)
    return [min(1, high * x) for x in p]


def dense_adapted(s: list[float], budget: float) -> tuple[float, float]:
    count, total = len(s), sum(s)
    support = sum(math.sqrt(v) for v in s) ** 2 / (count * total)
    entropy = -sum(v / total * math.log(v / total) for v in s) / math.log(count)
    raw = 0.1 + 0.7 * (0.7 * support + 0.3 * (1 - entropy))
    budget = min(max(0.9 * budget + 0.1 * raw, 0.1), 0.8)
    return budget, min(max(min(1 - entropy, 1 - 1e-4 / budget), 0.05), 0.5)


@pytest.mark.parametrize("kind", [Quadratic, TiedLM])
def test_twenty_four_steps_are_those_of_the_paper(kind: type[nn.Module]):
    model, twin = kind().double(), kind().double()
    optimizer = ZOOptimizer(model, CurvZO(EPSILON, adapt=10), LR, SEED)
    at, names = weights(twin), list(optimizer.blocks.names)
    s, slope, budget, mixture = [0.01] * len(names), None, 0.4, 0.1
    for step in range(24):
        optimizer.step(model)
        key, pi = Key(SEED, step), dense_inclusion(s, budget, mixture)
        given = [p / (1 - math.prod(1 - q for q in pi)) for p in pi]
        part = sample_blocks(torch.tensor(pi, dtype=torch.float64), optimizer.blocks, key)
        z = {n: standard_noise(n, key, at[n].shape, dtype=torch.float64) * (i in part) for i, n in enumerate(names)}
        plus, minus = (
            functional_call(twin, {n: at[n] + by * z[n] for n in at}, (), tie_weights=True).item() for by in (EPSILON, -EPSILON)
        )
        g = (plus - minus) / (2 * EPSILON)
        at = {n: at[n] - LR * g / given[i] * z[n] for i, n in enumerate(names)}
        slope = abs(g) if slope is None else 0.9 * slope + 0.1 * abs(g)
        energy = {i: at[names[i]].numel() / given[i] ** 2 for i in part}
        for i in part:
            s[i] = 0.9 * s[i] + 0.1 * abs(g) / slope * energy[i] / sum(energy.values())
        if (step + 1) % 10 == 0:
            budget, mixture = dense_adapted(s, budget)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, at[name], rtol=0, atol=1e-6)
    state = optimizer.method_state
    assert state.sensitivity.tolist() == pytest.approx(s, rel=1e-6)
    assert (state.slope, state.budget, state.mixture) == pytest.approx((slope, budget, mixture), rel=1e-6)


def test_with_a_budget_of_1_it_is_mezo_bit_for_bit():
    model, other = TiedLM(), TiedLM()
    for m, method in ((model, CurvZO(budget=1.0, adapt=5)), (other, MeZO())):
        optimizer = ZOOptimizer(m, method, LR)
        for _ in range(12):
            optimizer.step(m)
    assert same_bits(weights(model), weights(other))


def state_of(sensitivity: list[float], budget: float = 0.4, mixture: float = 0.5) -> CurvZOState:
    return CurvZOState(torch.tensor(sensitivity, dtype=torch.float64), 1.0, budget, mixture)


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.8])
def test_probabilities_add_up_to_the_budget_and_follow_the_sensitivity(budget: float):
    pi = inclusion(state_of([0.001, 0.01, 0.02, 1.0, 5.0, 0.5, 0.5, 0.1, 0.1, 0.1], budget))
    assert pi.sum().item() == pytest.approx(10 * budget)
    assert pi.max() <= 1 and pi.min() > 0
    assert pi[4] >= pi[3] > pi[2] > pi[1] > pi[0]


def test_blocks_take_part_as_often_as_their_probability_given_that_some_do():
    blocks = Blocks.of(TiedLM())
    pi = torch.tensor([0.5, 0.1, 0.3, 0.05, 0.2, 0.02], dtype=torch.float64)
    found = torch.zeros(6, dtype=torch.float64)
    for step in range(4000):
        found[list(sample_blocks(pi, blocks, Key(0, step)))] += 1 / 4000
    torch.testing.assert_close(found, pi / (1 - torch.prod(1 - pi)), rtol=0, atol=0.03)


def test_its_estimate_of_a_linear_loss_is_right_on_average():
    """Over every set that may be sampled, and over rademacher noise, whose mean is taken by hand: E[z z^T] = 1."""
    pi = inclusion(state_of([0.01, 0.5, 2.0], 0.5))
    slopes = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)  # one coordinate in each block
    given, mean = pi / (1 - torch.prod(1 - pi)), torch.zeros(3, dtype=torch.float64)
    some = 1 - torch.prod(1 - pi)
    for inside in itertools.product([0, 1], repeat=3):
        chosen = torch.tensor(inside, dtype=torch.float64)
        chance = torch.prod(torch.where(chosen > 0, pi, 1 - pi)) / some
        mean += chance * chosen * slopes / given if chosen.any() else 0
    torch.testing.assert_close(mean, slopes)


def test_only_the_blocks_drawn_are_perturbed_and_moved():
    model = TiedLM()
    start = weights(model)
    optimizer = ZOOptimizer(model, CurvZO(), LR)
    looked = []
    optimizer.step(lambda: (looked.append(weights(model)), model())[1])
    part = sample_blocks(inclusion(CurvZO().init(optimizer.blocks)), optimizer.blocks, Key(0))
    for i, name in enumerate(optimizer.blocks.names):
        assert torch.equal(start[name], looked[0][name]) == (i not in part)
        assert torch.equal(start[name], weights(model)[name]) == (i not in part)


def test_the_budget_falls_towards_few_sensitive_blocks_and_rises_towards_many():
    even, uneven = state_of([1.0] * 20), state_of([1e-6] * 19 + [1.0])
    assert adapt_budget(even).budget > 0.4 > adapt_budget(uneven).budget
    assert adapt_budget(even).mixture == 0.05 and adapt_budget(uneven).mixture == 0.5
    for _ in range(200):
        even, uneven = adapt_budget(even), adapt_budget(uneven)
    assert 0.1 <= uneven.budget < even.budget <= 0.8


@pytest.mark.filterwarnings("ignore:no loss has changed")
def test_a_loss_without_slope_breaks_nothing():
    model = TiedLM()
    optimizer = ZOOptimizer(model, CurvZO(adapt=2), LR)
    for _ in range(10):
        optimizer.step(lambda: 1.0)
    assert torch.isfinite(optimizer.method_state.sensitivity).all()
    assert replace(optimizer.method_state).slope == 0.0


@pytest.mark.parametrize("budget", [0.0, 1.1, float("nan")])
def test_a_budget_that_is_none_is_refused(budget: float):
    with pytest.raises(ValueError, match=r"budget=.* must be above 0 and at most 1"):
        CurvZO(budget=budget)
