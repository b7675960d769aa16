"""Sparse embeddings: the rows that a batch does not look up have gradient zero, so nothing is lost by leaving them."""

from __future__ import annotations

import pytest
import torch
from cases import TiedLM, same_bits, weights
from torch import Tensor, nn

from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, PerturbedParameters
from l2l.tuners.api import Tuner

TOUCHED = [1, 4, 5, 11]


class Untied(nn.Module):
    """A bag of looked-up rows and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.table = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 3)

    def forward(self) -> Tensor:
        return self.head(self.table(torch.tensor([[1, 5, 4], [11, 1, 1]])).mean(1)).logsumexp(-1).sum()


def one_step(sparse: bool, walk, num_directions: int = 1, dtype: torch.dtype = torch.float32):
    model = Untied().to(dtype)
    optimizer = ZOOptimizer(model, MeZO(num_directions=num_directions), lr=0.1, perturb=walk, sparse_embeddings=sparse)
    optimizer.step(lambda: model().float())
    assert optimizer.report is not None
    return weights(model), optimizer.report


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("num_directions", [1, 2])
def test_losses_are_the_same_and_only_the_rows_looked_up_move(walk, num_directions: int):
    before = weights(Untied())
    (dense, seen), (sparse, also) = (one_step(flag, walk, num_directions) for flag in (False, True))
    for one, other in zip(seen.estimates, also.estimates, strict=True):
        tolerance = {"rel": 1e-5} if num_directions > 1 and walk == "in_place" else {"abs": 0, "rel": 0}
        assert one.loss_plus == pytest.approx(other.loss_plus, **tolerance)
        assert one.loss_minus == pytest.approx(other.loss_minus, rel=1e-6)
    others = [row for row in range(20) if row not in TOUCHED]
    assert torch.equal(sparse["table.weight"][others], before["table.weight"][others])
    torch.testing.assert_close(sparse["table.weight"][TOUCHED], dense["table.weight"][TOUCHED], rtol=1e-3, atol=1e-4)
    assert not torch.equal(sparse["table.weight"][TOUCHED], before["table.weight"][TOUCHED])


def test_stored_rows_come_back_exactly_though_the_rest_is_walked_in_place():
    model = Untied()
    optimizer = ZOOptimizer(model, MeZO(), lr=1e-30, sparse_embeddings=True)
    before = weights(model)
    for _ in range(20):
        optimizer.step(model)
    assert torch.equal(weights(model)["table.weight"], before["table.weight"])


def test_merged_steps_equal_plain_ones():
    ends = []
    for managed in (False, True):
        model = Untied()
        optimizer = ZOOptimizer(model, MeZO(), lr=0.05, sparse_embeddings=True)
        with optimizer.theta.fused_steps() if managed else torch.no_grad():
            losses = [optimizer.step(model) for _ in range(30)]
        ends.append((losses, weights(model)))
    assert ends[0][0] == ends[1][0]
    assert same_bits(ends[0][1], ends[1][1])


def test_an_error_puts_the_rows_back():
    model = Untied()
    optimizer = ZOOptimizer(model, MeZO(), lr=0.1, sparse_embeddings=True)
    optimizer.step(model)
    before, calls = weights(model), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError
        return model()

    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    assert torch.equal(weights(model)["table.weight"], before["table.weight"])


def test_half_precision_rows_move_as_well():
    before = Untied().to(torch.bfloat16).table.weight.detach().clone()
    after, _ = one_step(True, "functional", dtype=torch.bfloat16)
    others = [row for row in range(20) if row not in TOUCHED]
    assert torch.equal(after["table.weight"][others], before[others])
    assert not torch.equal(after["table.weight"][TOUCHED], before[TOUCHED])


def test_the_learned_method_works_with_them():
    model = Untied()
    optimizer = ZOOptimizer(model, Learned(Tuner.for_model(model)), lr=0.01, sparse_embeddings=True)
    losses = [optimizer.step(model) for _ in range(5)]
    assert len(set(losses)) == 5


def test_an_embedding_tied_to_the_head_is_refused_and_nothing_moves():
    model = TiedLM()
    optimizer = ZOOptimizer(model, MeZO(), lr=0.1, sparse_embeddings=True)
    before = weights(model)
    with pytest.raises(ValueError, match=r"block 'embed.weight' is also read whole, by linear.*tied to the head"):
        optimizer.step(model)
    assert max((before[n] - v).abs().max().item() for n, v in weights(model).items()) < 1e-6


def test_a_model_without_embeddings_is_refused():
    with pytest.raises(ValueError, match="no embedding is trained"):
        PerturbedParameters(Blocks.of(nn.Linear(2, 2)), sparse_embeddings=True)


def test_rows_that_a_failed_step_looked_up_do_not_move_in_the_next():
    model = Untied()
    optimizer = ZOOptimizer(model, MeZO(), lr=0.1, sparse_embeddings=True)

    def failing() -> Tensor:
        model.table(torch.tensor([19]))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    before = model.table.weight.detach().clone()
    optimizer.step(model)
    assert torch.equal(model.table.weight[19], before[19])
    assert not torch.equal(model.table.weight[TOUCHED], before[TOUCHED])
