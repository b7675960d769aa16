"""SubZero+: against its paper's Algorithm 3, its signs, and as what it reduces to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_same_run, moved, normal, run
from torch import Tensor, nn

from l2l.methods.subzero import InSubspace
from l2l.methods.subzero_plus import SubZeroPlus, haar
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks

RANK, INTERVAL, QUERIES, BETAS, EPS = 3, 4, 5, (0.8, 0.9), 1e-6


def thin(name: str, what: str, step: int, rows: int) -> Tensor:
    """Q of a QR decomposition with a positive diagonal of R, as Equation 11 has it."""
    q, r = torch.linalg.qr(normal(f"{name}#{what}", Key(SEED, step), rows, RANK))
    return q @ torch.diag(torch.sign(torch.diagonal(r)))


class Paper:
    """Algorithm 3 with U Z V^T times sqrt(m n) / r; what is no matrix moves along its noise, by Adam of its own."""

    def __init__(self) -> None:
        self.steps, self.means, self.squares = 0, {}, {}

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        since, self.steps = key.step - key.step % INTERVAL, self.steps + 1

        def expanded(name: str, core: Tensor) -> Tensor:
            if at[name].ndim == 1:
                return core
            m, n = at[name].shape
            return math.sqrt(m * n) / RANK * thin(name, "rows", since, m) @ core @ thin(name, "columns", since, n).T

        center, total = loss(at), {}
        for k in range(QUERIES):
            draw = key.with_draw(k)
            vectors = {name: normal(name, draw, len(value)) for name, value in at.items() if value.ndim == 1}
            cores = {name: normal(f"{name}#core", draw, RANK, RANK) for name in at} | vectors
            g = (loss(moved(at, EPSILON, {name: expanded(name, core) for name, core in cores.items()})) - center) / EPSILON
            total = {name: total.get(name, 0) + g * core / QUERIES for name, core in cores.items()}
        following = {}
        for name, found in total.items():
            (one, two), t = BETAS, self.steps
            self.means[name] = one * self.means.get(name, 0) + (1 - one) * found
            self.squares[name] = two * self.squares.get(name, 0) + (1 - two) * found**2
            step = self.means[name] / (1 - one**t) / ((self.squares[name] / (1 - two**t)).sqrt() + EPS)
            following[name] = at[name] - LR * expanded(name, step)
        return following


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


def small(**given: Any) -> SubZeroPlus:
    fields = {"num_directions": QUERIES, "rank": RANK, "interval": INTERVAL, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
    return SubZeroPlus(EPSILON, **fields | given)


def test_it_takes_the_steps_of_the_paper(model: nn.Module):
    assert_same_run(model, small(), Paper().step, steps=9)


def test_a_step_takes_one_pass_per_query_and_one_at_theta(model: nn.Module):
    optimizer = run(model, small(), steps=1)
    assert optimizer.report is not None
    assert optimizer.report.passes == small().passes == QUERIES + 1
    assert len({estimate.loss_center for estimate in optimizer.report.estimates}) == 1


def test_all_queries_of_a_step_share_the_subspaces_that_its_state_holds(model: nn.Module):
    optimizer = ZOOptimizer(model, small(), LR, SEED)
    for step in range(2 * INTERVAL):
        optimizer.step(model)
        assert optimizer.report is not None
        drawn = optimizer.method_state.drawn
        shapes = [estimate.direction.shape for estimate in optimizer.report.estimates]
        assert all(isinstance(shape, InSubspace) and shape.subspaces is drawn.subspaces for shape in shapes)
        assert drawn.since == step - step % INTERVAL


def test_a_first_step_goes_by_the_learning_rate_in_every_direction_of_the_subspace():
    """Adam's first step is the sign of the estimate: |sqrt(m n) / r U S V^T|_F = sqrt(m n) with S of plus and minus one."""
    model = TiedLM().double()
    before = weights(model)
    run(model, small(eps=1e-30), steps=1)
    moved_by = (weights(model)["attention.qkv.weight"] - before["attention.qkv.weight"]).square().mean().sqrt().item()
    assert moved_by == pytest.approx(LR, rel=1e-6)


def test_columns_are_orthonormal_span_the_noise_and_have_no_preferred_sign():
    draw = torch.Generator().manual_seed(0)
    first = []
    for _ in range(400):
        noise = torch.randn(6, 3, generator=draw, dtype=torch.float64)
        q = haar(noise)
        torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(q @ (q.T @ noise), noise)
        assert ((q.T @ noise).diagonal() > 0).all()  # R
        first.append(q[0, 0])
    values = torch.stack(first)
    assert abs(values.mean().item()) < 0.06  # of a uniform point on a sphere: mean 0, mean square 1 / 6
    assert values.square().mean().item() == pytest.approx(1 / 6, rel=0.15)


def test_it_keeps_subspaces_and_two_small_matrices_each_and_adam_of_vectors():
    blocks = Blocks.of(Quadratic())
    assert small().state_bytes(blocks) == 4 * (RANK * (5 + 4) + 2 * RANK**2 + 2 * 6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank=0 must be a whole number, at least 1"),
        ({"interval": 0}, "interval=0 must be a whole number"),
        ({"num_directions": 0}, "num_directions=0 must be a whole number"),
        ({"beta1": 1.0}, r"beta1=1\.0 must be at least 0 and below 1"),
        ({"eps": 0.0}, r"eps=0\.0 must be positive"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        SubZeroPlus(**wrong)
