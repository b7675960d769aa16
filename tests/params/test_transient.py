"""Transient copies: whatever reads a parameter, in whatever order, reads the perturbed one."""

from __future__ import annotations

import pytest
import torch
from cases import TiedLM
from perturbed import language_loss, perturbed_in_place
from torch import Tensor, nn
from torch.nn import functional

import l2l.params.functional
from l2l.models.shapes import tiny_random
from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters


class Unusual(nn.Module):
    """Reads its parameters in every way but calling the module that owns them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.inner = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4)

    def forward(self) -> Tensor:
        ids = torch.tensor([[0, 2], [2, 4]])
        x = self.table(ids) + self.table.weight.mean(0)
        weight = self.inner.weight.t()
        bias = self.inner.bias
        x = sum(x @ self.experts[i] for i in range(3))
        assert self.inner.weight.shape == (4, 4)
        both = torch.cat([weight, self.inner.weight])
        return (functional.linear(x, both) + torch.cat([bias, bias])).square().mean()


def test_parameters_are_replaced_however_they_are_read():
    model = Unusual()
    theta = PerturbedParameters(Blocks.of(model), perturb="functional")
    u = Direction(Key(9), (1.0,) * len(theta.blocks))
    theta.perturb(u, 0.1)
    with torch.no_grad():
        assert theta.evaluate(model).item() == perturbed_in_place(model, u, 0.1)().item()


def test_gradients_away_from_home_are_refused():
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model), perturb="functional")
    theta.perturb(Direction(Key(9), (1.0,) * 6), 0.1)
    with pytest.raises(RuntimeError, match="gradients can only be taken of unperturbed weights"):
        theta.evaluate(model)


@pytest.mark.parametrize("evaluations", [1, 3])
def test_transient_copies_take_no_more_than_two_of_the_largest_block(evaluations: int):
    model = tiny_random("opt")
    theta = PerturbedParameters(Blocks.of(model), perturb="functional")
    largest = max(block.numel for block in theta.blocks)
    for number in range(evaluations):
        theta.perturb(Direction(Key(number), (1.0,) * len(theta.blocks)), 0.1)
        with torch.inference_mode():
            theta.evaluate(language_loss(model))
        held = theta._engine._substitution.copies.held  # pyright: ignore[reportAttributeAccessIssue]
        assert 0 < held <= 2 * largest


def test_copies_are_made_together_once_the_order_is_known(monkeypatch: pytest.MonkeyPatch):
    model = tiny_random("llama")
    theta = PerturbedParameters(Blocks.of(model), perturb="functional")
    calls = []
    genuine = l2l.params.functional.add_noise
    monkeypatch.setattr(l2l.params.functional, "add_noise", lambda p, *rest: (calls.append(len(p)), genuine(p, *rest)))
    counts = []
    for number in range(3):
        theta.perturb(Direction(Key(number), (1.0,) * len(theta.blocks)), 0.1)
        calls.clear()
        with torch.inference_mode():
            theta.evaluate(language_loss(model))
        counts.append(len(calls))
    assert counts[0] == len(theta.blocks)
    assert counts[1] == counts[2] < counts[0] / 2


class Whimsical(nn.Module):
    """Reads its parameters in another order at every call, some twice, some not at all, some through views."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(4, 4, generator=draw)) for _ in range(6)])
        self.calls = 0

    def forward(self) -> Tensor:
        order = torch.randint(0, 6, (9,), generator=torch.Generator().manual_seed(self.calls // 2)).tolist()
        self.calls += 1
        x, views = torch.eye(4), []
        for i in order:
            views.append(self.parts[i].t())
            x = torch.tanh(x @ self.parts[i] + views[0])
        return sum((view.sum() for view in views), x.sum())


def test_any_order_of_reading_gives_the_same_copies():
    model = Whimsical()
    theta = PerturbedParameters(Blocks.of(model), perturb="functional")
    for number in range(20):
        u = Direction(Key(number), (1.0,) * 6)
        theta.perturb(u, 0.1)
        with torch.no_grad():
            wanted = perturbed_in_place(model, u, 0.1)
            assert theta.evaluate(model).item() == wanted().item()
