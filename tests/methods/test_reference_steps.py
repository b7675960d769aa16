"""Each method against a dense step written from its paper, with materialised noise, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.dizo import DiZO, projected_blocks
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.tuners.api import Tuner
from l2l.tuners.networks import PerBlockMLP

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]
Loss = Callable[[Weights], float]


def loss_of(model: nn.Module) -> Loss:
    return lambda at: functional_call(model, at, (), tie_weights=True).item()


def noise(at: Weights, step: int, draw: int = 0) -> Weights:
    key = Key(SEED, step, draw)
    return {name: standard_noise(name, key, value.shape, dtype=torch.float64) for name, value in at.items()}


def moved(at: Weights, by: float, u: Weights) -> Weights:
    return {name: value + by * u[name] for name, value in at.items()}


def dense_step(loss: Loss, at: Weights, us: list[Weights]) -> tuple[Weights, float, float]:
    """theta - lr * mean of g * u; with the losses of the last direction."""
    following, plus, minus = at, 0.0, 0.0
    for u in us:
        plus, minus = loss(moved(at, EPSILON, u)), loss(moved(at, -EPSILON, u))
        following = moved(following, -LR * (plus - minus) / (2 * EPSILON) / len(us), u)
    return following, plus, minus


def dense_projection(loss: Loss, at: Weights, anchor: Weights, step: int, method: DiZO) -> Weights:
    """DiZO's search over gamma, each projected block's distance from where training began."""
    tau, reach, a = method.clip, method.epsilon_projection, method.step_size
    norm = {name: (at[name] - anchor[name]).norm().item() for name in anchor}

    def project(gamma: dict[str, float]) -> Weights:
        return at | {n: anchor[n] + gamma[n] / norm[n] * (at[n] - anchor[n]) for n in anchor}

    gamma = dict(norm)
    for iteration in range(method.iterations):
        key = Key(SEED, step, iteration)
        z = {n: standard_noise(f"{n}#projection", key, torch.Size([1]), dtype=torch.float64).item() for n in anchor}
        z = {n: math.copysign(min(abs(z[n]), tau / reach * norm[n]), z[n]) for n in anchor}
        plus = loss(project({n: gamma[n] + reach * z[n] for n in anchor}))
        minus = loss(project({n: gamma[n] - reach * z[n] for n in anchor}))
        g = (plus - minus) / (2 * reach)
        gamma = {n: gamma[n] - a * norm[n] * g * z[n] for n in anchor}
        gamma = {n: min(max(gamma[n], (1 - tau) * norm[n]), (1 + tau) * norm[n]) for n in anchor}
    return project(gamma)


def network(tuner: Tuner, row: int) -> nn.Sequential:
    """Block ``row``'s network as an ordinary module of torch."""
    stacked = tuner.network
    assert isinstance(stacked, PerBlockMLP)
    plain = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
    parts = (stacked.first_weight, stacked.first_bias, stacked.second_weight, stacked.second_bias)
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), parts, strict=True):
            parameter.copy_(value[row].reshape(parameter.shape))
    return plain


def dense_sigma(tuner: Tuner, at: Weights, embeddings: set[str], last: tuple[float, float, list[float]]) -> list[float]:
    """sigma of every block as its own network gives it, then the normaliser's common factor as the last entry."""
    sigma, counted, spent = [], 0.0, 0.0
    for row, (name, value) in enumerate(at.items()):
        x = torch.tensor([value.mean().item(), value.var().item(), last[0], last[1], last[2][row]])
        sigma.append(abs(network(tuner, row)(x).item()))
        rows = min(len(value), 15 * tuner.normalizer.batch_size) if name in embeddings else len(value)
        count = value.numel() * rows / len(value)
        counted, spent = counted + count, spent + count * sigma[-1] ** 2
    return [*sigma, math.sqrt(counted / spent)]


def assert_near(model: nn.Module, wanted: Weights, atol: float = 1e-10) -> None:
    for name, value in weights(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=atol)


@pytest.fixture(params=[Quadratic, LogisticRegression, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


@pytest.mark.parametrize("num_directions", [1, 3])
def test_mezo(model: nn.Module, num_directions: int):
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, MeZO(EPSILON, num_directions), LR, SEED)
    for step in range(5):
        optimizer.step(model)
        at, _, _ = dense_step(loss, at, [noise(at, step, draw) for draw in range(num_directions)])
        assert_near(model, at)


def test_dizo(model: nn.Module):
    method = DiZO(EPSILON, interval=3, iterations=4)
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, method, LR, SEED)
    anchor = {optimizer.blocks[i].name: at[optimizer.blocks[i].name] for i in projected_blocks(optimizer.blocks, None)}
    for step in range(7):
        optimizer.step(model)
        at, _, _ = dense_step(loss, at, [noise(at, step)])
        if step in (2, 5):
            at = dense_projection(loss, at, anchor, step, method)
        assert_near(model, at)


def test_learned(model: nn.Module):
    tuner = Tuner.for_model(model, seed=3)
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, Learned(tuner, epsilon=EPSILON), LR, SEED)
    embeddings = {block.name for block in optimizer.blocks if block.embedding}
    last = (0.0, 0.0, [1.0] * len(at))
    for step in range(5):
        optimizer.step(model)
        *sigma, factor = dense_sigma(tuner, at, embeddings, last)
        z = noise(at, step)
        u = {name: factor * s * z[name] for name, s in zip(at, sigma, strict=True)}
        at, plus, minus = dense_step(loss, at, [u])
        last = (plus, minus, sigma)
        assert_near(model, at, atol=1e-7)  # a tuner computes in float32
