"""Evolution strategies: where their gradients point, ranks, roles, and a theta that comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bowl import SIZES, Bowl, basis, meta_gradient, point_on, tuner_of, weights_of
from torch import Tensor, nn

from l2l.meta.objectives.evolution import ESFullRun, Evolution, centred_ranks, first_of_role
from l2l.meta.state import MetaState
from l2l.methods.learned import Learned
from l2l.noise import Key, standard_noise
from l2l.params import Blocks, PerturbedParameters
from l2l.tuners.api import Tuner


def loss_behind(model: Bowl, weights: Tensor, names: list[str], point: Any) -> Tensor:
    """The held-out loss behind one step as a function of the tuner's weights, all of it differentiable."""
    network, at, named = point.method.tuner.network, 0, {}
    for name, weight in network.named_parameters():
        named[name] = weights[at : at + weight.numel()].view(weight.shape)
        at += weight.numel()
    features = point.method.tuner.features(point.history.at(point.theta.blocks))
    sigma = torch.func.functional_call(network, named, (features,)).double()
    energy = sum(size * s**2 for size, s in zip(SIZES, sigma, strict=True))
    factor = (sum(SIZES) / energy) ** 0.5
    noise = [
        standard_noise(name, point.key, p.shape, dtype=torch.float64) for name, p in zip(names, model.parameters(), strict=True)
    ]
    u = torch.cat([(factor * sigma[i] * z).reshape(-1) for i, z in enumerate(noise)])
    x = model.flat().detach()
    x = x - point.lr * ((model.hessian @ x + model.tilts[0]) @ u) * u
    return 0.5 * x @ model.hessian @ x + model.tilts[1] @ x


def test_evolution_points_where_the_analytic_gradient_points():
    model = Bowl()
    point = point_on(model, tuner_of(model, hidden=2), lr=3e-2)
    network = point.method.tuner.network
    weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()]).requires_grad_()
    (exact,) = torch.autograd.grad(loss_behind(model, weights, ["matrix", "vector"], point), weights)
    outcome = Evolution(population=100, scale=1e-3, steps=1)(point)
    found = meta_gradient(outcome, network)
    assert torch.cosine_similarity(found, exact.double(), dim=0) > 0.8
    assert found.norm() == pytest.approx(exact.norm().item(), rel=0.3)
    assert outcome.passes == 2 + 100 * 2 * 3
    assert outcome.sigma_gradient is None


def test_evolution_builds_no_graph_over_the_model():
    model = Bowl()

    def loss() -> Tensor:
        assert not torch.is_grad_enabled()
        return model(0)

    point = point_on(model, tuner_of(model))
    Evolution(population=1, steps=2)(replace(point, closure=loss, other=loss, further=lambda i: loss))


class Valley(nn.Module):
    """All that can be gained lies in one block; the other only makes the loss steep."""

    def __init__(self) -> None:
        super().__init__()
        self.useful = nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.steep = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.5 * (self.useful**2).sum() + 20 * (self.steep**2).sum()


def valley_point(model: nn.Module, loss: Callable[[], Tensor]) -> MetaState:
    tuner = Tuner.for_model(model, "table")
    theta = PerturbedParameters(Blocks.of(model))
    method = Learned(tuner)
    return MetaState(loss, loss, lambda i: loss, theta, method, method.init(theta.blocks), Key(3, 5), 1e-2)


def test_it_asks_for_more_where_something_is_to_be_gained_and_for_less_where_it_is_steep():
    model = Valley()
    point, before = valley_point(model, model), weights_of(model)
    outcome = ESFullRun(population=6, scale=0.5, steps=20)(point)
    (slope,) = torch.autograd.grad(outcome.surrogate, list(point.method.tuner.network.parameters()))
    assert slope[0] < 0 < slope[1]
    assert outcome.value < outcome.loss
    assert outcome.passes == 2 + 12 * (2 * 20 + 8)  # the third loss: at the first five steps, then at every fifth
    for kept, now in zip(before, model.parameters(), strict=True):
        assert torch.allclose(kept, now, rtol=1e-12, atol=1e-12)


def test_a_run_that_diverges_is_the_worst_and_spoils_nothing():
    model = Valley()
    calls = iter(range(10**6))

    def loss() -> Tensor:
        return model() if next(calls) % 97 != 50 else torch.tensor(math.nan)

    point, before = valley_point(model, loss), weights_of(model)
    outcome = ESFullRun(population=4, steps=10)(point)
    assert torch.isfinite(outcome.surrogate)
    assert math.isfinite(outcome.value)
    for kept, now in zip(before, model.parameters(), strict=True):
        assert torch.allclose(kept, now, rtol=1e-12, atol=1e-12)


def test_weights_of_one_role_move_alike():
    model = nn.ModuleDict({f"layers.{i}".replace(".", "_"): nn.Linear(2, 2, bias=False) for i in range(3)})
    tuner = Tuner.for_model(model, "table")
    (delta,) = ESFullRun(tie="role").delta(tuner, Key(1))
    assert delta[0] == delta[1] == delta[2]
    (free,) = ESFullRun().delta(tuner, Key(1))
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


def test_whole_runs_teach_a_tuner_with_a_basis_role_by_role():
    model = Bowl()
    point = point_on(model, tuner_of(model, basis(), architecture="table"))
    before = weights_of(model)
    objective = ESFullRun(population=3, steps=6, tie="role")
    (delta,) = objective.delta(point.method.tuner, Key(1))
    assert delta.shape == (2, 2)
    (slope,) = torch.autograd.grad(objective(point).surrogate, list(point.method.tuner.network.parameters()))
    assert slope[0, 0] != 0 and slope[0, 1] != 0
    assert all(torch.allclose(p, kept, rtol=1e-12, atol=1e-12) for p, kept in zip(model.parameters(), before, strict=True))
