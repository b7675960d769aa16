"""A basis of a sparse embedding: its rows move as those of the whole would, and the others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from based import EPSILON, based, formula
from cases import same_bits, weights
from torch import Tensor, nn

from l2l.params import Blocks, PerturbedParameters

TOUCHED = [1, 4, 5, 11]
OTHERS = [row for row in range(20) if row not in TOUCHED]


class Untied(nn.Module):
    """A bag of looked-up rows and a head of its own; the rows are kept for tests to look at."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.table = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 3)
        self.seen = torch.empty(0)

    def forward(self) -> Tensor:
        self.seen = self.table(torch.tensor([1, 5, 4, 11, 1, 1]))
        return self.head(self.seen).float().logsumexp(-1).sum()


def walked(sparse: bool, walk: Any, dtype: torch.dtype, sigma: float, update: Any = "master") -> tuple[Any, ...]:
    """Losses at both sides, the rows as the second saw them, and the weights behind a step."""
    model = Untied().to(dtype)
    theta = PerturbedParameters(Blocks.of(model), walk, update, sparse_embeddings=sparse)
    u, losses = based(theta.blocks, sigma), []
    with torch.no_grad(), theta.step():
        for distance in (EPSILON, -EPSILON):
            theta.perturb(u, distance)
            losses.append(theta.evaluate(model).item())
        theta.add(u, [0.1] * len(theta.blocks))
    return losses, model.seen, weights(model), theta, u


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_losses_and_rows_are_those_of_the_whole_embedding(walk: Any, sigma: float):
    (losses, seen, dense, *_), (also, rows, sparse, *_) = (walked(flag, walk, torch.float32, sigma) for flag in (False, True))
    assert also == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(rows, seen, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sparse["table.weight"][TOUCHED], dense["table.weight"][TOUCHED], rtol=1e-6, atol=3e-7)
    assert torch.equal(sparse["table.weight"][OTHERS], Untied().table.weight[OTHERS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["master", "stochastic"])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_rows_move_by_the_formula(dtype: torch.dtype, update: Any, sigma: float):
    _, _, after, theta, u = walked(True, "auto", dtype, sigma, update)
    before = weights(Untied().to(dtype))["table.weight"]
    moved = theta.value(0).double() - before.double()
    wanted = 0.1 * formula(theta.blocks, u)["table.weight"]
    coarse = dtype == torch.bfloat16 and update == "stochastic"
    torch.testing.assert_close(moved[TOUCHED], wanted[TOUCHED], rtol=1e-3, atol=2**-7 if coarse else 1e-6)
    assert torch.equal(after["table.weight"][OTHERS], before[OTHERS])


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_half_precision_rows_are_looked_up_as_they_are_perturbed(sigma: float):
    _, seen, _, theta, u = walked(True, "functional", torch.bfloat16, sigma)
    before = weights(Untied().to(torch.bfloat16))["table.weight"].double()
    wanted = (before - EPSILON * formula(theta.blocks, u)["table.weight"])[[1, 5, 4, 11, 1, 1]]
    torch.testing.assert_close(seen.double(), wanted, rtol=2**-8, atol=1e-6)


def test_stored_rows_come_back_exactly():
    model = Untied()
    theta = PerturbedParameters(Blocks.of(model), sparse_embeddings=True)
    u, before = based(theta.blocks), weights(model)
    for _ in range(10):
        with torch.no_grad(), theta.step():
            theta.perturb(u, EPSILON)
            theta.evaluate(model)
    assert torch.equal(weights(model)["table.weight"], before["table.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_an_embedding_that_nobody_looked_up_does_not_move(dtype: torch.dtype, update: Any):
    model = Untied().to(dtype)
    theta = PerturbedParameters(Blocks.of(model), update=update, sparse_embeddings=True)
    before = weights(model)
    theta.add(based(theta.blocks), [0.1] * len(theta.blocks))
    after = weights(model)
    assert torch.equal(after["table.weight"], before["table.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_puts_the_rows_back(dtype: torch.dtype):
    model = Untied().to(dtype)
    theta = PerturbedParameters(Blocks.of(model), sparse_embeddings=True)
    u, before = based(theta.blocks), weights(model)
    with torch.no_grad(), pytest.raises(RuntimeError), theta.step():
        theta.perturb(u, EPSILON)
        theta.evaluate(model)
        theta.add(u, [0.1] * len(theta.blocks))
        theta.perturb(u, EPSILON)
        raise RuntimeError
    if dtype == torch.bfloat16:
        assert same_bits(before, weights(model))
    torch.testing.assert_close(weights(model)["table.weight"], before["table.weight"], rtol=1e-6, atol=1e-6)
