"""The objective of whole runs: what it approves of, ranks, roles, and a theta that comes back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bowl import weights_of
from torch import Tensor, nn

from l2l.meta.objectives.base import MetaState
from l2l.meta.objectives.runs import ESFullRun, centred_ranks, first_of_role
from l2l.methods.learned import Learned
from l2l.noise import Key
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tuners.api import Tuner


class Valley(nn.Module):
    """All that can be gained lies in one block; the other only makes the loss steep."""

    def __init__(self) -> None:
        super().__init__()
        self.useful = nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.steep = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.5 * (self.useful**2).sum() + 20 * (self.steep**2).sum()


def point_on(model: nn.Module, loss: Callable[[], Tensor]) -> MetaState:
    tuner = Tuner.for_model(model, "table")
    theta = PerturbedParameters(Blocks.of(model))
    method = Learned(tuner)
    return MetaState(loss, loss, lambda i: loss, theta, method, method.init(theta.blocks), Key(3, 5), 1e-2)


def test_it_asks_for_more_where_something_is_to_be_gained_and_for_less_where_it_is_steep():
    model = Valley()
    point, before = point_on(model, model), weights_of(model)
    outcome = ESFullRun(population=12, scale=0.5, steps=40)(point)
    (slope,) = torch.autograd.grad(outcome.surrogate, list(point.method.tuner.network.parameters()))
    assert slope[0] < 0 < slope[1]
    assert outcome.value < outcome.loss
    assert outcome.passes == 2 + 24 * (2 * 40 + 12)  # the third loss: at the first five steps, then at every fifth
    for kept, now in zip(before, model.parameters(), strict=True):
        assert torch.allclose(kept, now, rtol=1e-12, atol=1e-12)


def test_a_run_that_diverges_is_the_worst_and_spoils_nothing():
    model = Valley()
    calls = iter(range(10**6))

    def loss() -> Tensor:
        return model() if next(calls) % 97 != 50 else torch.tensor(math.nan)

    point, before = point_on(model, loss), weights_of(model)
    outcome = ESFullRun(population=4, steps=10)(point)
    assert torch.isfinite(outcome.surrogate)
    assert math.isfinite(outcome.value)
    for kept, now in zip(before, model.parameters(), strict=True):
        assert torch.allclose(kept, now, rtol=1e-12, atol=1e-12)


def test_weights_of_one_role_move_alike():
    model = nn.ModuleDict({f"layers.{i}".replace(".", "_"): nn.Linear(2, 2, bias=False) for i in range(3)})
    tuner = Tuner.for_model(model, "table")
    (delta,) = ESFullRun(tie="role")._delta(tuner, Key(1))
    assert delta[0] == delta[1] == delta[2]
    (free,) = ESFullRun()._delta(tuner, Key(1))
    assert len(set(free.tolist())) == 3


def test_ranks_are_centred_whatever_the_losses():
    assert centred_ranks([3.0, 1.0, 2.0]) == [0.5, -0.5, 0.0]
    assert centred_ranks([1.0, math.inf, math.inf, 0.0]) == pytest.approx([-1 / 6, 1 / 3, 1 / 3, -0.5])
    assert centred_ranks([2.0, 2.0]) == [0.0, 0.0]
    assert sum(centred_ranks([0.3, 0.1, 7.0, 2.0, 2.0])) == pytest.approx(0)
    assert centred_ranks([1.0]) == [0.0]


def test_roles_are_names_without_the_number_of_the_layer():
    names = ["embed", "layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "layers.10.q", "norm"]
    assert first_of_role(names) == [0, 1, 2, 1, 2, 1, 6]


@pytest.mark.parametrize(("args", "said"), [({"population": 0}, "population=0"), ({"tie": "kind"}, "tie='kind'")])
def test_wrong_settings_are_refused(args: dict[str, object], said: str):
    with pytest.raises(ValueError, match=said):
        ESFullRun(**args)  # pyright: ignore[reportArgumentType]
