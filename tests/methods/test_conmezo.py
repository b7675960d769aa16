"""ConMeZO: against its paper's pseudo-code, the geometry of its cone, and as what it reduces to."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import MethodCase, Quadratic, TiedLM, same_bits, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run, two_sided
from torch import Tensor, nn

from l2l.methods.conmezo import ConMeZO, ConMeZOState
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import dense_direction

ANGLE, BETA = 1.2, 0.9


class Paper:
    """z = sqrt(d) cos(angle) m / |m| + sin(angle) u; m <- beta m + (1 - beta) g z, from m = 0 and z = u."""

    def __init__(self, betas: list[float]) -> None:
        self.betas, self.momentum = betas, None

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        z = {name: normal(name, key, *value.shape) for name, value in at.items()}
        if self.momentum is not None:
            norm = torch.cat([value.flatten() for value in self.momentum.values()]).norm()
            along = math.sqrt(sum(value.numel() for value in at.values())) * math.cos(ANGLE) / norm
            z = {name: along * self.momentum[name] + math.sin(ANGLE) * z[name] for name in at}
        g, beta = two_sided(loss, at, z), self.betas[key.step]
        old = self.momentum or {name: torch.zeros_like(value) for name, value in at.items()}
        self.momentum = {name: beta * old[name] + (1 - beta) * g * z[name] for name in at}
        return moved(at, -LR * g, z)


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


@pytest.mark.parametrize("warm_up", [0, 10])
def test_it_takes_the_steps_of_the_paper(model: nn.Module, warm_up: int):
    method = ConMeZO(EPSILON, angle=ANGLE, beta=BETA, warm_up=warm_up)
    betas = [BETA] * 20
    for step in range(warm_up):
        share = max(0.0, (step - 0.1 * warm_up) / (0.9 * warm_up))
        betas[step] = BETA - (BETA - 0.1) / (1 + 8 * share**1.8) ** 3
    assert_same_run(model, method, Paper(betas).step)


def test_its_first_step_is_that_of_mezo(model: nn.Module):
    other = type(model)().double()
    seen = [run(each, method, steps=1) for each, method in ((model, ConMeZO()), (other, MeZO()))]
    left, right = (optimizer.report for optimizer in seen)
    assert left is not None and right is not None
    assert left.projected_gradient == right.projected_gradient
    assert_near(weights(model), weights(other), 0, 1e-12)


def test_a_right_angle_is_mezo(model: nn.Module):
    other = type(model)().double()
    run(model, ConMeZO(num_directions=2, angle=math.pi / 2))
    run(other, MeZO(num_directions=2))
    assert_near(weights(model), weights(other), 1e-8, 1e-10)


class Wide(nn.Module):
    """Two blocks of many coordinates, with gradients of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(60, 50, dtype=torch.float64))
        self.two = nn.Parameter(torch.zeros(3000, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.one - 1).square().sum() + 1e-3 * (self.two + 1).square().sum()


def flat(values: Any) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def test_directions_lie_on_the_cone_around_momentum_and_are_as_long_as_noise():
    model = Wide()
    optimizer = run(model, ConMeZO(angle=1.0, beta=0.5, warm_up=0), steps=3, lr=1e-5)
    state = optimizer.method_state
    assert isinstance(state, ConMeZOState) and isinstance(optimizer.method, ConMeZO)
    direction = optimizer.method.direction(optimizer.blocks, state, Key(SEED, 3))
    z, m = flat([dense_direction(direction, optimizer.blocks, i) for i in range(2)]), flat(state.momenta)
    assert torch.cosine_similarity(z, m, dim=0).item() == pytest.approx(math.cos(1.0), abs=0.03)
    assert z.square().mean().item() == pytest.approx(1, rel=0.05)


def test_the_norm_of_momentum_is_measured_where_a_mean_recurrence_would_be_wrong():
    model = TiedLM().double()
    optimizer = run(model, ConMeZO(angle=0.5, beta=0.3, warm_up=0), steps=6)
    assert isinstance(optimizer.method, ConMeZO)
    state: ConMeZOState = optimizer.method_state
    along = math.sqrt(optimizer.blocks.numel) * math.cos(0.5) / flat(state.momenta).norm()
    direction = optimizer.method.direction(optimizer.blocks, state, Key(SEED, 6))
    for i, block in enumerate(optimizer.blocks):
        u = math.sin(0.5) * normal(block.name, Key(SEED, 6), *block.tensor.shape)
        torch.testing.assert_close(dense_direction(direction, optimizer.blocks, i) - u, along * state.momenta[i])


def test_beta_is_held_then_rises_to_its_value():
    method = ConMeZO()
    betas = [method.beta_at(step) for step in range(2100)]
    assert betas[0] == betas[200] == pytest.approx(0.1)
    assert betas[2000] == betas[-1] == 0.99
    assert all(a <= b for a, b in pairwise(betas))
    assert 0.5 < betas[600] < 0.99
    assert ConMeZO(warm_up=0).beta_at(0) == 0.99
    assert ConMeZO(beta=0.05).beta_at(0) == pytest.approx(0.05)


def test_a_tuner_scales_the_whole_cone():
    model = TiedLM().double()
    method = MethodCase("learned+conmezo", {"conmezo": {"warm_up": 0}}).make(model)
    optimizer = run(model, method, steps=3)
    before, old = weights(model), [m.clone() for m in optimizer.method_state.inner.momenta]
    optimizer.step(model)
    assert optimizer.report is not None
    g, direction = optimizer.report.projected_gradient, optimizer.report.estimates[0].direction
    assert direction.shape is not None and len(set(direction.sigma)) == len(optimizer.blocks)
    for i, block in enumerate(optimizer.blocks):
        change = before[block.name] - block.tensor.detach()
        new = optimizer.method_state.inner.momenta[i]
        torch.testing.assert_close((new - 0.99 * old[i]) / 0.01, change / LR, rtol=1e-6, atol=1e-8)
        assert g != 0 and change.abs().max() > 0


def test_momentum_is_part_of_the_step_and_of_nothing_else(model: nn.Module):
    """A step that fails in its second evaluation leaves momentum as it was."""
    optimizer = run(model, ConMeZO(warm_up=0), steps=2)
    before, calls = [m.clone() for m in optimizer.method_state.momenta], 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of something")
        return model()

    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.method_state.momenta, strict=True))


def test_weight_decay_beside_it_is_the_plain_one(model: nn.Module):
    other = type(model)().double()
    left, right = ZOOptimizer(model, ConMeZO(), LR, SEED, 0.1), ZOOptimizer(other, MeZO(), LR, SEED, 0.1)
    left.step(model)
    right.step(other)
    assert_near(weights(model), weights(other), 0, 1e-13)
    assert not same_bits(weights(model), weights(type(model)().double()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"angle": 0.0}, "angle=0.0 must be positive"),
        ({"angle": 2.0}, r"angle=2\.0 must be at most pi / 2"),
        ({"beta": 1.0}, r"beta=1\.0 must be at least 0 and below 1"),
        ({"warm_up": -1}, "warm_up=-1 must be a whole number, at least 0"),
        ({"num_directions": 0}, "num_directions=0 must be a whole number"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ConMeZO(**wrong)
