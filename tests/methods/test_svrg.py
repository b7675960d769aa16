"""MeZO-SVRG against its paper, and where the released code is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, farthest, same_bits, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from l2l.methods.mezo import MeZO
from l2l.methods.svrg import SVRG, SVRGState
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.params import Direction, dense_direction

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]


class Sampled(nn.Module):
    """Least squares over 40 rows, seen in batches of 8; two blocks."""

    x: Tensor
    y: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(2, 5, generator=draw))
        self.bias = nn.Parameter(torch.randn(2, generator=draw))
        self.register_buffer("x", torch.randn(40, 5, generator=draw))
        self.register_buffer("y", torch.randn(40, 2, generator=draw))

    def forward(self, batch: int) -> Tensor:
        rows = slice(8 * (batch % 5), 8 * (batch % 5) + 8)
        return functional.mse_loss(self.x[rows] @ self.matrix.t() + self.bias, self.y[rows])


def further(model: nn.Module, step: int) -> Callable[[int], Callable[[], Tensor]]:
    """The i-th further batch of a step: batches step, step + 1, ... are the full data set."""
    return lambda i: lambda: model(step + 1 + i)


def noise(at: Weights, step: int, draw: int) -> Weights:
    return {n: standard_noise(n, Key(SEED, step, draw), v.shape, dtype=torch.float64) for n, v in at.items()}


def moved(at: Weights, by: float, u: Weights) -> Weights:
    return {name: value + by * u[name] for name, value in at.items()}


class Dense:
    """The paper's algorithm with copies of everything, the full estimate among them."""

    def __init__(self, model: nn.Module, method: SVRG) -> None:
        self.model, self.method, self.at = model, method, weights(model)
        self.anchor, self.full = self.at, self.at

    def slope(self, at: Weights, batch: int, u: Weights) -> float:
        plus, minus = (functional_call(self.model, moved(at, by, u), (batch,)).item() for by in (EPSILON, -EPSILON))
        return (plus - minus) / (2 * EPSILON)

    def step(self, step: int) -> None:
        method, at = self.method, self.at
        us = [noise(at, step, draw) for draw in range(method.num_directions)]
        if step % method.interval == 0:
            batches = range(step, step + method.anchor_batches)
            slopes = [sum(self.slope(at, b, u) for b in batches) / len(batches) for u in us]
            self.anchor, self.full = at, {n: torch.zeros_like(v) for n, v in at.items()}
            for g, u in zip(slopes, us, strict=True):
                self.full = moved(self.full, g / method.num_directions, u)
            self.at = moved(at, -LR, self.full)
            return
        v = self.full
        for u in us:
            v = moved(v, (self.slope(at, step, u) - self.slope(self.anchor, step, u)) / method.num_directions, u)
        self.at = moved(at, -LR * method.ratio, v)


@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize(("interval", "batches"), [(2, 5), (4, 3), (1, 2)])
def test_it_takes_the_steps_of_the_paper(interval: int, batches: int, num_directions: int):
    model = Sampled().double()
    method = SVRG(EPSILON, num_directions, interval=interval, anchor_batches=batches, ratio=0.5)
    optimizer, dense = ZOOptimizer(model, method, LR, SEED), Dense(model, method)
    for step in range(20):
        optimizer.step(lambda step=step: model(step), further(model, step))
        dense.step(step)
        assert farthest(weights(model), dense.at) < 1e-6


def test_an_anchor_at_every_step_and_one_batch_is_mezo(problem):
    anchored, plain = problem.make(), problem.make()
    left = ZOOptimizer(anchored, SVRG(interval=1, anchor_batches=1), LR, SEED)
    right = ZOOptimizer(plain, MeZO(), LR, SEED)
    for _ in range(10):
        left.step(anchored)
        right.step(plain)
        assert farthest(weights(anchored), weights(plain)) < 1e-6
    exact, other = problem.make(), problem.make()
    ZOOptimizer(exact, SVRG(interval=1, anchor_batches=1), LR, SEED, perturb="functional").step(exact)
    ZOOptimizer(other, MeZO(), LR, SEED, perturb="functional").step(other)
    assert same_bits(weights(exact), weights(other))


def test_at_the_anchor_the_correction_vanishes_and_the_step_is_the_full_batchs_alone():
    model = Quadratic().double()
    optimizer = ZOOptimizer(model, SVRG(EPSILON, anchor_batches=1), LR, SEED)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(model)
    state, start = optimizer.method_state, weights(model)
    optimizer.param_groups[0]["lr"] = LR
    optimizer.step(model)
    along = Direction(Key(SEED, 0), (1.0, 1.0))
    for i, (name, value) in enumerate(weights(model).items()):
        wanted = -LR * 0.1 * state.gradients[0] * dense_direction(along, optimizer.blocks, i)
        torch.testing.assert_close(value - start[name], wanted, rtol=1e-7, atol=1e-12)


def test_the_anchor_stays_where_theta_was_while_theta_moves():
    model = TiedLM().double()
    optimizer = ZOOptimizer(model, SVRG(interval=4), LR, SEED)
    at: list[Weights] = []
    for step in range(8):
        at.append(weights(model))
        optimizer.step(model)
        state = optimizer.method_state
        assert isinstance(state, SVRGState) and state.since == step - step % 4
        kept = dict(zip(optimizer.blocks.names, state.anchor, strict=True))
        assert farthest(kept, at[state.since]) < 1e-12
        assert farthest(kept, weights(model)) > 1e-6


def test_both_estimates_of_a_correction_look_along_one_direction():
    model, seen = TiedLM().double(), []
    optimizer = ZOOptimizer(model, SVRG(interval=3, anchor_batches=1), LR, SEED)
    anchor = weights(model)
    optimizer.step(model)
    start = weights(model)

    def watched() -> Tensor:
        seen.append(weights(model))
        return model()

    optimizer.step(watched)
    assert len(seen) == 4
    for name, value in start.items():
        for k in range(2):
            here, there = seen[k][name] - value, seen[2 + k][name] - anchor[name]
            torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-12)


def test_the_correction_takes_variance_away_where_noise_of_its_own_adds_it():
    """Spread of corrected and plain estimates over batches, at a small distance from the anchor."""
    model = Sampled().double()
    dense = Dense(model, SVRG(EPSILON))
    u = noise(dense.at, 1, 0)
    near = moved(dense.at, 0.01, noise(dense.at, 0, 0))
    plain = torch.tensor([dense.slope(near, batch, u) for batch in range(5)])
    corrected = torch.tensor([dense.slope(near, batch, u) - dense.slope(dense.at, batch, u) for batch in range(5)])
    other = noise(dense.at, 2, 0)
    apart = torch.tensor([dense.slope(near, b, u) - dense.slope(dense.at, b, other) for b in range(5)])
    assert corrected.std() < 0.1 * plain.std() < apart.std()


@pytest.mark.parametrize("failing_call", [3, 4])
@pytest.mark.parametrize("walk", ["in_place", "functional"])
def test_an_error_at_the_anchor_leaves_theta_where_the_step_began(failing_call: int, walk):
    model, calls = TiedLM(), 0
    optimizer = ZOOptimizer(model, SVRG(), LR, SEED, perturb=walk)
    optimizer.step(model)
    before, state = weights(model), optimizer.method_state

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return model()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert calls == failing_call
    assert farthest(before, weights(model)) < 1e-6
    assert optimizer.method_state is state


@pytest.mark.parametrize(("interval", "batches", "wanted"), [(2, 4, 6.0), (5, 8, 6.4), (1, 3, 6.0)])
def test_passes_are_those_of_its_two_kinds_of_steps(interval: int, batches: int, wanted: float):
    model, method = TiedLM(), SVRG(interval=interval, anchor_batches=batches)
    optimizer, spent = ZOOptimizer(model, method, LR, SEED), 0
    for _ in range(10):
        optimizer.step(model)
        assert optimizer.report is not None
        spent += optimizer.report.passes
    assert spent / 10 == method.passes == pytest.approx(wanted)


@pytest.mark.parametrize("bad", [{"num_directions": 0}, {"interval": 0}, {"anchor_batches": 0}])
def test_counts_that_make_no_sense_are_refused(bad: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=0 must be a whole number"):
        SVRG(**bad)


@pytest.mark.parametrize("bad", [{"epsilon": -0.5}, {"ratio": -0.5}])
def test_sizes_that_make_no_sense_are_refused(bad: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}=-0\.5 must be positive"):
        SVRG(**bad)
