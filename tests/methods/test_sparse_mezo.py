"""Sparse MeZO against its paper's step, dense: masks of unperturbed weights, thresholds of those before training."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.mezo import MeZO
from l2l.methods.sparse_mezo import SparseMeZO
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer

LR, EPSILON, SEED = 0.01, 1e-3, 4


@pytest.mark.parametrize("kind", [Quadratic, TiedLM])
def test_twenty_steps_are_those_of_the_paper(kind: type[nn.Module]):
    model, twin = kind().double(), kind().double()
    optimizer = ZOOptimizer(model, SparseMeZO(EPSILON, sparsity=0.6), LR, SEED)
    at = weights(twin)
    limit = {n: w.abs().flatten().sort().values[math.ceil(round(0.4 * w.numel(), 6)) - 1] for n, w in at.items()}
    limit |= {n: torch.tensor(math.inf) for n, w in at.items() if w.abs().min() == w.abs().max()}
    for step in range(20):
        optimizer.step(model)
        key = Key(SEED, step)
        masks = {n: w.abs() <= limit[n] for n, w in at.items()}
        u = {n: masks[n] * standard_noise(n, key, w.shape, dtype=torch.float64) for n, w in at.items()}
        plus, minus = (
            functional_call(twin, {n: at[n] + by * u[n] for n in at}, (), tie_weights=True).item() for by in (EPSILON, -EPSILON)
        )
        at = {n: at[n] - LR * (plus - minus) / (2 * EPSILON) * u[n] for n in at}
    for name, value in weights(model).items():
        torch.testing.assert_close(value, at[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_directions", [1, 2])
def test_with_sparsity_0_it_is_mezo_bit_for_bit(num_directions: int):
    model, other = TiedLM(), TiedLM()
    for m, method in (
        (model, SparseMeZO(sparsity=0.0, num_directions=num_directions)),
        (other, MeZO(num_directions=num_directions)),
    ):
        optimizer = ZOOptimizer(m, method, LR)
        for _ in range(10):
            optimizer.step(m)
    assert same_bits(weights(model), weights(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_small_weights_move_and_they_are_as_many_as_asked_for(dtype: torch.dtype):
    model = TiedLM().to(dtype)
    before = weights(model)
    optimizer = ZOOptimizer(model, SparseMeZO(sparsity=0.75), lr=1.0)
    optimizer.step(lambda: model().float())
    name = "embed.weight"
    after, start = weights(model)[name], before[name]
    moved = (after - start).abs() > 1e-4 if dtype == torch.float32 else after != start
    assert moved.float().mean().item() == pytest.approx(0.25, abs=0.05)
    limit = start.abs().flatten().kthvalue(start.numel() // 4).values
    assert start[moved].abs().max() <= limit  # noise is 0 now and then: some small ones do not move either


def test_the_mask_of_a_step_does_not_depend_on_where_theta_stands():
    """In a managed loop theta is away, and moves wait, when the next step begins."""
    looked: list[list[Tensor]] = []
    for managed in (False, True):
        model = TiedLM().double()
        optimizer = ZOOptimizer(model, SparseMeZO(epsilon=0.05, sparsity=0.5), LR)
        seen: list[Tensor] = []

        def step(model: TiedLM = model, seen: list[Tensor] = seen) -> Tensor:
            seen.append(model.embed.weight.detach().clone())
            return model()

        with optimizer.theta.fused_steps() if managed else torch.no_grad():
            for _ in range(6):
                optimizer.step(step)
        looked.append(seen)
    for one, other in zip(*looked, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_mask_is_taken_anew_and_thresholds_stay():
    model = TiedLM()
    optimizer = ZOOptimizer(model, SparseMeZO(sparsity=0.5), lr=0.5)
    limits, sizes = optimizer.method_state.thresholds, []
    for _ in range(20):
        start = weights(model)["embed.weight"]
        optimizer.step(model)
        sizes.append(((weights(model)["embed.weight"] - start).abs() > 1e-6).sum().item())
    assert optimizer.method_state.thresholds == limits
    assert sizes[-1] < sizes[0]  # weights that grew past their threshold have stopped


def test_blocks_whose_weights_are_all_of_one_size_are_trained_whole():
    optimizer = ZOOptimizer(TiedLM(), SparseMeZO())
    thresholds = dict(zip(optimizer.blocks.names, optimizer.method_state.thresholds, strict=True))
    assert thresholds["norm.weight"] == thresholds["norm.bias"] == math.inf
    assert thresholds["embed.weight"] < math.inf


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_that_is_none_is_refused(sparsity: float):
    with pytest.raises(ValueError, match=r"sparsity=.* must be at least 0 and below 1"):
        SparseMeZO(sparsity=sparsity)
