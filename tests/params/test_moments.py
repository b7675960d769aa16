"""Moments after a step follow in closed form from sums that were taken while walking."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TiedLM, farthest, weights
from torch import nn

from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters
from l2l.params.engine import block_moments


def blocks_of_all_kinds(dtype: torch.dtype = torch.float32) -> Blocks:
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1000, 37, generator=draw) * 0.02,
        torch.ones(513),
        torch.randn(1, generator=draw),
        torch.zeros(8),
        1000 + torch.randn(70_000, generator=draw) * 0.01,
    ]
    return Blocks.of(nn.ParameterList([nn.Parameter(tensor.to(dtype)) for tensor in tensors]))


def exact(blocks: Blocks) -> list[tuple[float, float]]:
    double = [block.flat.double() for block in blocks]
    return [(t.mean().item(), t.var().item() if len(t) > 1 else 0.0) for t in double]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measured_moments_are_those_of_the_weights(dtype: torch.dtype):
    blocks = blocks_of_all_kinds(dtype)
    for (mean, variance), (wanted, spread) in zip(block_moments(blocks), exact(blocks), strict=True):
        assert mean == pytest.approx(wanted, rel=1e-6, abs=1e-8)
        assert variance == pytest.approx(spread, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("amount", [0.0, 1e-5, -3e-2])
def test_moments_before_a_step_is_written_equal_those_measured_after_it(walk, amount: float):
    blocks = blocks_of_all_kinds()
    theta = PerturbedParameters(blocks, walk)
    centre = tuple(mean for mean, _ in block_moments(blocks))
    u = Direction(Key(3), tuple(0.5 + 0.1 * i for i in range(len(blocks))), factor=1.5, centre=centre)
    with theta.step():
        theta.perturb(u, 1e-3)
        theta.perturb(u, -1e-3)
        theta.add(u, [amount] * len(blocks))
        found = theta.moments(u)
    for (mean, variance), (wanted, spread) in zip(found, block_moments(blocks), strict=True):
        assert mean == pytest.approx(wanted, rel=1e-6, abs=1e-7)
        assert variance == pytest.approx(spread, rel=2e-3 if wanted > 999 else 2e-5, abs=1e-11)


@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_right_also_where_they_must_be_measured(centred: bool):
    blocks = blocks_of_all_kinds()
    theta = PerturbedParameters(blocks)
    u = Direction(Key(3), (1.0,) * len(blocks), centre=tuple(m for m, _ in block_moments(blocks)) if centred else None)
    v = Direction(Key(4), (1.0,) * len(blocks))
    with theta.step():
        theta.perturb(u, 1e-3)
        theta.add(v, [0.1] * len(blocks))
        found = theta.moments(u)
        assert theta.displacement.restored
    for (mean, variance), (wanted, spread) in zip(found, exact(blocks), strict=True):
        assert mean == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        assert variance == pytest.approx(spread, rel=1e-3 if centred or wanted < 900 else 1.0, abs=1e-2)


def test_a_nan_among_the_weights_is_not_masked():
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight[3, 3] = math.nan
    (mean, variance), (bias_mean, _) = block_moments(Blocks.of(model))
    assert math.isnan(mean)
    assert math.isnan(variance)
    assert math.isfinite(bias_mean)


def test_moments_do_not_depend_on_the_number_of_threads():
    found = set()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(block_moments(blocks_of_all_kinds()))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_taking_sums_does_not_change_where_theta_stands():
    (model, plain), amounts = (TiedLM(), TiedLM()), [0.1] * 6
    for one, centre in ((model, (0.0,) * 6), (plain, None)):
        theta = PerturbedParameters(Blocks.of(one))
        u = Direction(Key(5), (1.0,) * 6, centre=centre)
        theta.perturb(u, 1e-3)
        theta.perturb(u, -1e-3)
        theta.add(u, amounts)
    assert farthest(weights(model), weights(plain)) == 0
