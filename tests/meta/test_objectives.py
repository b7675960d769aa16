"""All objectives alike: where they leave theta, what they hand on; and those that take real steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from bowl import SIZES, Bowl, basis, point_on, slopes, tuner_of, weights_of
from torch import Tensor

from l2l.meta.objectives import make_objective, objective_names
from l2l.meta.objectives.base import MetaLoss
from l2l.meta.objectives.evolution import Evolution
from l2l.meta.objectives.held_out import HeldOut
from l2l.meta.objectives.published import OneStepLoss
from l2l.meta.objectives.unrolled import Unrolled
from l2l.meta.trajectory import inner_key, replay
from l2l.noise import Key, standard_noise
from l2l.optim import zo_step
from l2l.params.basis import low_rank_noise

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("published", {}),
    ("held_out", {}),
    ("expected", {}),
    ("expected", {"keep": False}),
    ("expected_curvature", {"trace": "fisher"}),
    ("expected_curvature", {"trace": "hutchinson", "probes": 2}),
    ("expected_curvature", {"trace": "seen"}),
    ("ratio", {}),
    ("unrolled", {"steps": 3}),
    ("evolution", {"population": 2, "steps": 2}),
    ("runs", {"population": 2, "steps": 4}),
]
each = pytest.mark.parametrize(("name", "args"), VARIANTS, ids=lambda value: str(value))


def close(model: Bowl, before: list[Tensor]) -> bool:
    return all(
        torch.allclose(p, kept, rtol=1e-12, atol=1e-12) for p, kept in zip(model.parameters(), before, strict=True)
    )


def meta_gradient(outcome: MetaLoss, network: torch.nn.Module) -> Tensor:
    found = torch.autograd.grad(outcome.surrogate, list(network.parameters()), allow_unused=False)
    return torch.cat([value.reshape(-1) for value in found]).double()


def test_every_objective_of_the_package_is_tried_here():
    assert {name for name, _ in VARIANTS} == set(objective_names())


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
@each
def test_theta_and_tuner_are_where_they_were(name: str, args: dict[str, Any], inside: Tensor | None):
    model = Bowl()
    tuner = tuner_of(model, inside)
    before, weights = weights_of(model), weights_of(tuner.network)
    outcome = make_objective(name, **args)(point_on(model, tuner))
    assert close(model, before)
    assert all(torch.equal(p, kept) for p, kept in zip(tuner.network.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.any(meta_gradient(outcome, tuner.network) != 0)
    assert torch.isfinite(torch.tensor([outcome.value, outcome.loss])).all()


@each
def test_theta_and_tuner_are_where_they_were_after_an_error_at_any_evaluation(name: str, args: dict[str, Any]):
    model = Bowl()
    tuner = tuner_of(model)
    before, weights = weights_of(model), weights_of(tuner.network)
    objective = make_objective(name, **args)
    fatal = -1
    for fatal in itertools.count():
        calls = itertools.count()

        def loss(batch: int, calls: Any = calls, fatal: int = fatal) -> Tensor:
            if next(calls) == fatal:
                raise RuntimeError("out of memory")
            return model(batch)

        point = replace(
            point_on(model, tuner),
            closure=lambda loss=loss: loss(0),
            other=lambda loss=loss: loss(1),
            further=lambda i, loss=loss: lambda: loss(2 + i),
        )
        try:
            objective(point)
        except RuntimeError:
            assert close(model, before)
            assert all(torch.equal(p, kept) for p, kept in zip(tuner.network.parameters(), weights, strict=True))
            assert all(parameter.grad is None for parameter in model.parameters())
        else:
            break
    assert fatal >= 3


@each
def test_an_objective_hands_on_one_gradient_of_every_block_or_says_that_it_has_none(name: str, args: dict[str, Any]):
    model = Bowl()
    seen: list[int] = []
    objective = make_objective(name, **args)
    outcome = objective(point_on(model, tuner_of(model), consume=lambda index, gradient: seen.append(index)))
    assert sorted(seen) == ([0, 1] if objective.hands_gradients else [])
    assert outcome.report.key == Key(5, 7)
    assert outcome.history.step == 1


def test_closed_forms_hand_on_the_gradient_at_theta():
    model = Bowl()
    taken: dict[int, Tensor] = {}
    make_objective("expected")(point_on(model, tuner_of(model), consume=taken.__setitem__))
    for index, gradient in enumerate(model.gradient(0)):
        torch.testing.assert_close(taken[index], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
def test_the_published_gradient_is_exact_in_both_outputs(inside: Tensor | None):
    model = Bowl()
    point = point_on(model, tuner_of(model, inside), lr=0.1)
    outcome = OneStepLoss()(point)
    seen = outcome.report.estimates[0]
    amount = -point.lr * seen.projected_gradient * seen.direction.factor
    noise = [standard_noise(b.name, point.key, b.tensor.shape, dtype=torch.float64) for b in point.theta.blocks]
    along = [torch.zeros(6, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
    if inside is not None:
        along[0] = low_rank_noise("matrix", inside.double(), point.key, 6)
    sigma = torch.tensor(seen.direction.sigma, dtype=torch.float64, requires_grad=True)
    inner = torch.tensor(seen.direction.basis_sigma or (0.0, 0.0), dtype=torch.float64, requires_grad=True)
    moved = [
        p.detach() + amount * (sigma[i] * noise[i] + inner[i] * along[i]) for i, p in enumerate(model.parameters())
    ]
    x = torch.cat([part.reshape(-1) for part in moved])
    (0.5 * x @ model.hessian @ x + model.tilts[0] @ x).backward()
    assert outcome.sigma_gradient is not None and sigma.grad is not None and inner.grad is not None
    torch.testing.assert_close(outcome.sigma_gradient.double(), sigma.grad, rtol=1e-4, atol=1e-7)
    if inside is not None:
        assert outcome.basis_gradient is not None
        torch.testing.assert_close(outcome.basis_gradient.double(), inner.grad, rtol=1e-4, atol=1e-7)
        assert outcome.basis_gradient[1] == 0


def test_one_unrolled_step_is_the_held_out_objective():
    found = []
    for objective in (Unrolled(steps=1), HeldOut(), OneStepLoss()):
        model = Bowl()
        found.append(objective(point_on(model, tuner_of(model))))
    one, held, published = found
    assert one.value == held.value != published.value
    assert torch.equal(slopes(one), slopes(held))


def test_unrolled_steps_are_those_of_a_run_and_each_has_its_share_of_the_gradient():
    model, steps = Bowl(), 3
    point = point_on(model, tuner_of(model), lr=1e-3)
    before = weights_of(model)
    outcome = Unrolled(steps=steps)(point)
    history, state = point.history, []
    for number in range(steps):
        features = point.method.tuner.features(history)
        history, report = zo_step(
            lambda number=number: model(0 if number == 0 else 1 + number),
            point.theta,
            point.method,
            history,
            inner_key(point.key, number),
            [point.lr] * 2,
        )
        state.append((features, report))
    assert outcome.value == pytest.approx(model(1).item(), rel=1e-12)
    last = model.gradient(1)
    network, parts = point.method.tuner.network, []
    for features, report in state:
        seen = report.estimates[0]
        dots = [
            torch.sum(standard_noise(b.name, report.key, b.tensor.shape, dtype=torch.float64) * g)
            for b, g in zip(point.theta.blocks, last, strict=True)
        ]
        slope = -point.lr * seen.projected_gradient * seen.direction.factor * torch.stack(dots)
        parts.append(torch.sum(point.method.tuner.sigma(features, point.theta.blocks.names) * slope.float()))
    expected = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(torch.stack(parts).sum(), list(network.parameters()))]
    )
    torch.testing.assert_close(meta_gradient(outcome, network).float(), expected, rtol=1e-4, atol=1e-8)
    assert not close(model, before)


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
        standard_noise(name, point.key, p.shape, dtype=torch.float64)
        for name, p in zip(names, model.parameters(), strict=True)
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
    outcome = Evolution(population=200, scale=1e-3, steps=1)(point)
    found = meta_gradient(outcome, network)
    assert torch.cosine_similarity(found, exact.double(), dim=0) > 0.85
    assert found.norm() == pytest.approx(exact.norm().item(), rel=0.3)
    assert outcome.passes == 2 + 200 * 2 * 3
    assert outcome.sigma_gradient is None


def test_evolution_builds_no_graph_over_the_model():
    model = Bowl()

    def loss() -> Tensor:
        assert not torch.is_grad_enabled()
        return model(0)

    point = point_on(model, tuner_of(model))
    Evolution(population=1, steps=2)(replace(point, closure=loss, other=loss, further=lambda i: loss))


def test_a_step_can_be_taken_again_from_what_it_saw():
    model = Bowl()
    point = point_on(model, tuner_of(model, basis()), lr=0.1)
    report = OneStepLoss()(point).report
    before = weights_of(model)
    replay(point.theta, report, point.lr)
    again = weights_of(model)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        parameter.data.copy_(kept)
    zo_step(point.closure, point.theta, point.method, point.history, point.key, [point.lr] * 2)
    assert close(model, again)
    assert not close(model, before)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("publised", {}, "unknown objective 'publised'.*did you mean 'published'"),
        ("unrolled", {"step": 3}, r"objective_args of 'unrolled'.*its arguments are: steps"),
        ("unrolled", {"steps": 0}, "steps=0 must be a whole number"),
        ("evolution", {"scale": 0.0}, "scale=0.0 must be positive"),
        ("ratio", {"decay": 1.0}, "decay=1.0 must be at least 0 and below 1"),
        ("expected_curvature", {"trace": "exact"}, "trace='exact' must be one of fisher, hutchinson, seen"),
        ("no.such_module", {}, "no module 'no.such_module' can be imported"),
        ("l2l.meta.trajectory", {}, "defines 0 objectives"),
    ],
)
def test_a_wrong_objective_is_refused_with_a_way_out(name: str, args: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        make_objective(name, **args)
