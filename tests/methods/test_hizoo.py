"""HiZOO against its paper's step, dense, and what it does not share with the released code."""

from __future__ import annotations

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.hizoo import HiZOO
from l2l.methods.mezo import MeZO
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.params import Direction, dense_direction

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]


def dense_step(model: nn.Module, at: Weights, h: Weights, step: int, alpha: float) -> tuple[Weights, Weights]:
    """A step from the paper's pseudo-code."""

    def loss(by: float) -> float:
        moved = {name: at[name] + by * z[name] / h[name].sqrt() for name in at}
        return functional_call(model, moved, (), tie_weights=True).item()

    z = {n: standard_noise(n, Key(SEED, step), w.shape, dtype=torch.float64) for n, w in at.items()}
    plus, minus, home = loss(EPSILON), loss(-EPSILON), loss(0.0)
    g, bend = (plus - minus) / (2 * EPSILON), abs(plus + minus - 2 * home) / (2 * EPSILON**2)
    h = {n: (1 - alpha) * h[n] + alpha * bend * h[n] * z[n] ** 2 for n in h}
    return {n: at[n] - LR * g * z[n] / h[n].sqrt() for n in at}, h


@pytest.mark.parametrize("kind", [Quadratic, TiedLM])
def test_twenty_steps_are_those_of_the_paper(kind: type[nn.Module]):
    model, twin = kind().double(), kind().double()
    optimizer = ZOOptimizer(model, HiZOO(EPSILON, smooth=0.02), LR, SEED)
    at = weights(twin)
    h = {name: torch.ones_like(value) for name, value in at.items()}
    for step in range(20):
        optimizer.step(model)
        at, h = dense_step(twin, at, h, step, 0.02)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, at[name], rtol=0, atol=1e-6)
    for found, name in zip(optimizer.method_state.curvature, at, strict=True):
        torch.testing.assert_close(found, h[name], rtol=1e-4, atol=1e-6)


def test_with_smooth_0_it_is_mezo_for_a_pass_more():
    model, other = TiedLM().double(), TiedLM().double()
    left, right = (ZOOptimizer(m, k, LR, SEED) for m, k in ((model, HiZOO(smooth=0.0)), (other, MeZO())))
    for _ in range(10):
        left.step(model)
        right.step(other)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=1e-10)
    assert left.report is not None and right.report is not None
    assert (left.report.passes, right.report.passes) == (3, 2)


def test_by_default_the_curvature_is_learned():
    model = TiedLM()
    optimizer = ZOOptimizer(model, HiZOO(), LR)
    optimizer.step(model)
    assert all((h != 1).any() for h in optimizer.method_state.curvature)


def test_the_curvature_of_half_precision_weights_is_float32_and_a_small_alpha_is_not_lost():
    model = TiedLM().bfloat16()
    optimizer = ZOOptimizer(model, HiZOO(smooth=1e-4), LR)
    optimizer.step(lambda: model().float())
    for h in optimizer.method_state.curvature:
        assert h.dtype == torch.float32
        assert (h != 1).any()


def test_steep_coordinates_take_shorter_steps():
    model = Quadratic().double()
    steep = torch.tensor([1.0, 1, 1, 100, 100, 100], dtype=torch.float64)
    target = model.vector.detach().clone() - 1
    optimizer = ZOOptimizer(model, HiZOO(smooth=0.05), lr=1e-12)
    for _ in range(400):
        optimizer.step(lambda: 0.5 * (steep * (model.vector - target) ** 2).sum())
    h = optimizer.method_state.curvature[1]
    assert h[3:].min() > h[:3].max()


def test_a_block_that_is_not_looked_at_keeps_its_curvature():
    model = TiedLM().double()
    optimizer = ZOOptimizer(model, HiZOO(smooth=0.1), LR)
    method, state = optimizer.method, optimizer.method_state
    optimizer.step(model)
    assert optimizer.report is not None and isinstance(method, HiZOO)
    before = [h.clone() for h in state.curvature]
    u: Direction = optimizer.report.estimates[0].direction
    still = Direction(u.key, (0.0, *u.sigma[1:]), shape=u.shape)
    seen = type(optimizer.report.estimates[0])(still, 3.0, 3.1, -50.0, 3.0)
    for index in range(len(state.curvature)):
        method._update_curvature_(state.curvature, optimizer.blocks, (seen,), index)
    assert torch.equal(before[0], state.curvature[0])
    assert not torch.equal(before[1], state.curvature[1])


def test_what_is_walked_is_noise_over_the_root_of_the_curvature():
    model = TiedLM().double()
    optimizer = ZOOptimizer(model, HiZOO())
    state = optimizer.method_state
    state.curvature[0].fill_(4.0)
    assert isinstance(optimizer.method, HiZOO)
    u = optimizer.method.direction(optimizer.blocks, state, Key(1))
    block = optimizer.blocks[0]
    z = standard_noise(block.name, Key(1), block.tensor.shape, dtype=torch.float64)
    torch.testing.assert_close(dense_direction(u, optimizer.blocks, 0), z / 2)


@pytest.mark.parametrize("smooth", [-0.1, 1.0, float("nan")])
def test_a_smooth_that_is_none_is_refused(smooth: float):
    with pytest.raises(ValueError, match=r"smooth=.* must be at least 0 and below 1"):
        HiZOO(smooth=smooth)
