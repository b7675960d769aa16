"""TeZO and its momentum and Adam: against the paper's pseudo-code, the span it stays in, and as what they reduce to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import MethodCase, Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run, two_sided
from torch import Tensor, nn

from l2l.methods.tezo import TeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, Direction, dense_direction

RANK, BETAS, DELTA = 3, (0.8, 0.9), 1e-6


class Paper:
    """z = U diag(tau) V^T / sqrt(r); M and S of tau, (U * U) diag(S) (V * V)^T under Adam's root."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.first: Weights = {}
        self.second: Weights = {}

    def out(self, name: str, value: Tensor, inside: Tensor, power: int = 1) -> Tensor:
        """From a vector over the columns of U and V to the block."""
        if value.ndim == 1:
            return inside
        u = normal(f"{name}#rows", Key(SEED), value.shape[0], RANK) / math.sqrt(RANK)
        v = normal(f"{name}#columns", Key(SEED), value.shape[1], RANK)
        return torch.einsum("is,s,js->ij", u**power, inside, v**power)

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        tau = {
            name: normal(name, key, *value.shape) if value.ndim == 1 else normal(f"{name}#weights", key, RANK)
            for name, value in at.items()
        }
        g = two_sided(loss, at, {name: self.out(name, value, tau[name]) for name, value in at.items()})
        change = {}
        for name, value in at.items():
            seen = g * tau[name]
            self.first[name] = BETAS[0] * self.first.get(name, torch.zeros_like(seen)) + (1 - BETAS[0]) * seen
            self.second[name] = BETAS[1] * self.second.get(name, torch.zeros_like(seen)) + (1 - BETAS[1]) * seen**2
            change[name] = self.out(name, value, seen if self.rule == "sgd" else self.first[name])
            if self.rule == "adam":
                change[name] = change[name] / (self.out(name, value, self.second[name], 2).sqrt() + DELTA)
        return moved(at, -LR, change)


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_it_takes_the_steps_of_the_paper(model: nn.Module, rule: Any):
    method = TeZO(EPSILON, rank=RANK, rule=rule, betas=BETAS, delta=DELTA)
    assert_same_run(model, method, Paper(rule).step)


def test_momentum_that_keeps_nothing_is_plain(model: nn.Module):
    other = type(model)().double()
    run(model, TeZO(EPSILON, num_directions=2, rank=RANK, rule="momentum", betas=(0.0, 0.9)))
    run(other, TeZO(EPSILON, num_directions=2, rank=RANK))
    assert_near(weights(model), weights(other), 1e-10, 1e-13)


def test_adam_that_keeps_nothing_moves_by_the_sign_of_every_coordinate_at_rank_one(model: nn.Module):
    before = weights(model)
    optimizer = run(model, TeZO(EPSILON, rank=1, rule="adam", betas=(0.0, 0.0), delta=1e-12), steps=1)
    assert optimizer.report is not None
    (seen,) = optimizer.report.estimates
    for i, block in enumerate(optimizer.blocks):
        sign = (seen.projected_gradient * dense_direction(seen.direction, optimizer.blocks, i)).sign()
        torch.testing.assert_close(block.tensor.detach(), before[block.name] - LR * sign, rtol=0, atol=1e-6)


class OneMatrix(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.double())


def directions(method: TeZO, blocks: Blocks, seed: int, count: int) -> list[Tensor]:
    state = method.init(blocks)
    made: list[Direction] = [method.direction(blocks, state, Key(seed, step)) for step in range(count)]
    return [dense_direction(direction, blocks, 0) for direction in made]


def test_all_directions_of_a_run_lie_in_one_span_of_r_matrices_of_rank_one():
    blocks = Blocks.of(OneMatrix(torch.zeros(7, 5)))
    one, other = (torch.stack(directions(TeZO(rank=3), blocks, seed, 6)) for seed in (0, 1))
    assert torch.linalg.matrix_rank(one.flatten(1)) == 3
    assert torch.linalg.matrix_rank(torch.cat([one, other]).flatten(1)) == 6
    assert torch.linalg.matrix_rank(torch.cat(list(one))) == torch.linalg.matrix_rank(torch.cat(list(one), 1)) == 3


def test_with_a_high_rank_the_direction_has_the_covariance_of_plain_noise():
    blocks = Blocks.of(OneMatrix(torch.zeros(3, 2)))
    samples = torch.stack([u.flatten() for seed in range(40) for u in directions(TeZO(rank=60), blocks, seed, 20)])
    assert (samples.T @ samples / len(samples) - torch.eye(6)).abs().max() < 0.25


@pytest.mark.parametrize(("threshold", "rank"), [(0.0, 8), (0.25, 2), (0.6, 1), (0.01, 3)])
def test_the_rank_of_a_matrix_may_follow_from_its_spectrum(threshold: float, rank: int):
    values = torch.zeros(6, 4)
    values[[0, 1, 2], [2, 0, 1]] = torch.tensor([4.0, -2.0, 0.4])
    blocks = Blocks.of(OneMatrix(values))
    assert TeZO(rank=8, threshold=threshold).init(blocks).ranks == {0: rank}
    assert TeZO(rank=2, threshold=threshold).init(blocks).ranks == {0: min(rank, 2)}


@pytest.mark.parametrize(("rule", "copies"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_it_keeps_r_numbers_per_matrix_and_a_copy_of_vectors_for_every_mean(rule: Any, copies: int):
    method, blocks = TeZO(rank=RANK, rule=rule), Blocks.of(Quadratic())
    state = method.init(blocks)
    assert [[tuple(mean.shape) for mean in means] for means in state.means] == [[(RANK,), (6,)]] * copies
    assert method.state_bytes(blocks) == copies * 4 * (RANK + 6)


def test_only_adam_has_steps_of_a_length_of_its_own():
    assert [TeZO(rule=rule).step_is_normalized for rule in ("sgd", "momentum", "adam")] == [False, False, True]
    with pytest.raises(ValueError, match="lr='auto' is a share"):
        ZOOptimizer(Quadratic(), TeZO(rule="adam"), "auto")


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_a_tuner_scales_what_is_walked_and_what_is_moved(rule: str):
    model = TiedLM().double()
    before, own = weights(model), {"rank": 3, "rule": rule, "betas": (0.0, 0.0)}
    optimizer = run(model, MethodCase("learned+tezo", {"tezo": own}).make(model), steps=1)
    assert optimizer.report is not None
    (seen,) = optimizer.report.estimates
    us = {block.name: dense_direction(seen.direction, optimizer.blocks, i) for i, block in enumerate(optimizer.blocks)}
    assert len(set(seen.direction.sigma)) == len(us)
    assert_near(weights(model), moved(before, -LR * seen.projected_gradient, us), 1e-9, 1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 0.0}, "delta=0.0 must be positive"),
        ({"rank": 0}, "rank=0 must be a whole number, at least 1"),
        ({"threshold": 1.0}, r"threshold=1\.0 must be at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\) must be two numbers"),
        ({"rule": "adamw"}, "rule='adamw' must be one of sgd, momentum, adam"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TeZO(**wrong)
