"""LOZO and LOZO-M: against their papers' pseudo-code, at the steps that redraw V, and as what they reduce to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import MethodCase, Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run, two_sided
from torch import Tensor, nn

from l2l.methods.lozo import LOZO
from l2l.methods.lozo_m import LOZOM
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, dense_direction

RANK, INTERVAL, BETA = 2, 4, 0.7


def left(name: str, value: Tensor, key: Key) -> Tensor:
    return normal(f"{name}#rows", key, len(value), RANK)


def right(name: str, value: Tensor, step: int) -> Tensor:
    return normal(f"{name}#columns", Key(SEED, step), value[0].numel(), RANK)


def perturbation(at: Weights, key: Key) -> Weights:
    """U V^T as in the paper; what is no matrix moves along its noise, times sqrt(r) for the common division by it."""
    since = key.step - key.step % INTERVAL
    return {
        name: (left(name, value, key) @ right(name, value, since).T).view(value.shape)
        if value.ndim > 1
        else math.sqrt(RANK) * normal(name, key, *value.shape)
        for name, value in at.items()
    }


def paper_step(loss: Loss, at: Weights, key: Key) -> Weights:
    u = perturbation(at, key)
    c = two_sided(loss, at, {name: value / math.sqrt(RANK) for name, value in u.items()}) * math.sqrt(RANK)
    return moved(at, -LR * c / RANK, u)


class PaperMomentum:
    """N <- beta N (V_old^T V_new) / n + (1 - beta) c U and theta -= lr N V^T / r, V_old being V but when it is redrawn."""

    def __init__(self) -> None:
        self.momentum: Weights = {}

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        u = perturbation(at, key)
        c = two_sided(loss, at, {name: value / math.sqrt(RANK) for name, value in u.items()}) * math.sqrt(RANK)
        since, following = key.step - key.step % INTERVAL, {}
        for name, value in at.items():
            if value.ndim == 1:
                old = self.momentum.get(name, torch.zeros_like(value))
                self.momentum[name] = BETA * old + (1 - BETA) * c / RANK * u[name]
                following[name] = value - LR * self.momentum[name]
                continue
            new, old = right(name, value, since), self.momentum.get(name, torch.zeros(len(value), RANK).double())
            if key.step == since and key.step:
                old = old @ (right(name, value, since - INTERVAL).T @ new) / len(new)
            self.momentum[name] = BETA * old + (1 - BETA) * c * left(name, value, key)
            following[name] = value - LR * (self.momentum[name] @ new.T / RANK).view(value.shape)
        return following


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


def test_lozo_takes_the_steps_of_the_paper(model: nn.Module):
    assert_same_run(model, LOZO(EPSILON, rank=RANK, interval=INTERVAL), paper_step)


def test_lozo_m_takes_the_steps_of_the_paper(model: nn.Module):
    method = LOZOM(EPSILON, rank=RANK, interval=INTERVAL, beta=BETA)
    assert_same_run(model, method, PaperMomentum().step)


@pytest.mark.parametrize("walk", ["in_place", "functional"])
def test_at_every_step_that_redraws_v_the_update_is_along_what_was_perturbed(model: nn.Module, walk: Any):
    optimizer = ZOOptimizer(model, LOZO(EPSILON, rank=1, interval=2), LR, SEED, perturb=walk)
    for _ in range(5):
        at, before = [], weights(model)

        def watched(at: list[Weights] = at) -> Tensor:
            at.append({name: model.get_parameter(name) * 1.0 for name in weights(model)})
            return model()

        optimizer.step(watched)
        assert optimizer.report is not None
        g = optimizer.report.projected_gradient
        assert_near(weights(model), {n: w - LR * g * (at[0][n] - w) / EPSILON for n, w in before.items()}, 1e-6, 1e-10)


def test_a_shape_is_the_same_inside_an_evaluation_that_computes_in_less():
    model = TiedLM()
    optimizer = ZOOptimizer(model, LOZO(1.0), LR, SEED, perturb="functional")
    direction = optimizer.method.direction(optimizer.blocks, None, Key(SEED))  # pyright: ignore
    index, before = optimizer.blocks.names.index("attention.out.weight"), model.attention.out.weight.detach().clone()
    optimizer.theta.perturb(direction, 1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = optimizer.theta.evaluate(lambda: model.attention.out.weight * 1.0)
    torch.testing.assert_close(seen - before, dense_direction(direction, optimizer.blocks, index), rtol=0, atol=1e-6)


class OneMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2, 2, dtype=torch.float64))


def test_with_a_high_rank_the_direction_has_the_covariance_of_plain_noise():
    blocks = Blocks.of(OneMatrix())
    method = LOZO(rank=50, interval=1)
    drawn = [dense_direction(method.direction(blocks, None, Key(SEED, step)), blocks, 0).flatten() for step in range(800)]
    samples = torch.stack(drawn)
    assert (samples.T @ samples / len(samples) - torch.eye(12)).abs().max() < 0.25


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_coordinate_has_mean_square_one_whatever_the_rank(rank: int):
    blocks = Blocks.of(OneMatrix())
    method = LOZO(rank=rank, interval=1)
    squares = [dense_direction(method.direction(blocks, None, Key(SEED, s)), blocks, 0).square().mean() for s in range(400)]
    assert torch.stack(squares).mean().item() == pytest.approx(1, rel=0.2)


def test_v_stays_for_the_interval_and_u_does_not():
    blocks = Blocks.of(OneMatrix())
    us = [
        dense_direction(LOZO(rank=1, interval=3).direction(blocks, None, Key(SEED, s)), blocks, 0).view(3, 4) for s in range(4)
    ]
    assert torch.linalg.matrix_rank(torch.cat(us[:3])) == 1
    assert torch.linalg.matrix_rank(torch.cat(us[2:])) == 2
    assert torch.linalg.matrix_rank(torch.cat(us[:3], 1)) == 3


def test_without_momentum_lozo_m_is_lozo(model: nn.Module):
    other = type(model)().double()
    run(model, LOZOM(EPSILON, num_directions=2, interval=3, beta=0.0))
    run(other, LOZO(EPSILON, num_directions=2, interval=3))
    assert_near(weights(model), weights(other), 1e-10, 1e-13)


@pytest.mark.parametrize("name", ["lozo", "lozo_m"])
def test_a_tuner_scales_what_is_walked_and_what_is_moved(name: str):
    model = TiedLM().double()
    method = MethodCase(f"learned+{name}", {name: {"beta": 0.0}} if name == "lozo_m" else {}).make(model)
    before = weights(model)
    optimizer = run(model, method, steps=1)
    assert optimizer.report is not None
    (seen,) = optimizer.report.estimates
    assert len(set(seen.direction.sigma)) == len(optimizer.blocks)
    wanted = {
        block.name: before[block.name] - LR * seen.projected_gradient * dense_direction(seen.direction, optimizer.blocks, i)
        for i, block in enumerate(optimizer.blocks)
    }
    assert_near(weights(model), wanted, 1e-9, 1e-12)


def test_lozo_m_keeps_r_numbers_per_row_and_a_copy_of_vectors():
    method, blocks = LOZOM(rank=3), Blocks.of(Quadratic())
    state = method.init(blocks)
    assert [tuple(momentum.shape) for momentum in state.momenta] == [(5, 3), (6,)]
    assert method.state_bytes(blocks) == 4 * (5 * 3 + 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"rank": 0}, "rank=0 must be a whole number, at least 1"),
        ({"interval": 1.5}, r"interval=1\.5 must be a whole number"),
    ],
)
@pytest.mark.parametrize("kind", [LOZO, LOZOM])
def test_values_out_of_range_are_refused(kind: Any, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_momentum_out_of_range_is_refused(beta: float):
    with pytest.raises(ValueError, match=f"beta={beta} must be at least 0 and below 1"):
        LOZOM(beta=beta)
