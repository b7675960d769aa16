"""Closed-form objectives against their formulas, on a quadratic of which gradient and Hessian are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bowl import Bowl, basis, chain, inner, lambdas, point_on, slopes, tuner_of
from torch import Tensor

from l2l.meta.objectives.closed_forms import Expected, ExpectedCurvature, LogProgressRate, averaged, log_progress_rate
from l2l.meta.objectives.one_step_loss import OneStepLoss
from l2l.noise import Key


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
@pytest.mark.parametrize("keep", [True, False])
def test_the_first_order_expectation_is_its_formula(keep: bool, inside: Tensor | None):
    model = Bowl()
    point = point_on(model, tuner_of(model, inside))
    outcome = Expected(keep=keep)(point)
    products, energies = inner(model, inside, 0, 1), torch.tensor(lambdas(outcome), dtype=torch.float64)
    assert outcome.value == pytest.approx(-point.lr * torch.dot(energies, products).item(), rel=1e-6)
    torch.testing.assert_close(slopes(outcome), chain(outcome, -point.lr * products), rtol=1e-5, atol=1e-9)
    assert outcome.passes == 2 + (6 if keep else 12)
    assert outcome.loss == pytest.approx(model(0).item(), rel=1e-9)


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
def test_the_second_order_expectation_is_its_formula(inside: Tensor | None):
    model = Bowl()
    point = point_on(model, tuner_of(model, inside), lr=0.3)
    outcome = ExpectedCurvature(trace="fisher")(point)
    signal, energies = inner(model, inside, 0, 1), torch.tensor(lambdas(outcome), dtype=torch.float64)
    noisy = (inner(model, inside, 0, 0) + inner(model, inside, 1, 1)) / 2
    trace = 7 * inner(model, inside, 2, 2)  # the point says that 7 labels were drawn for batch 2
    spread, bend = torch.dot(energies, noisy).item(), torch.dot(energies, trace).item()
    value = -0.3 * torch.dot(energies, signal).item() + 0.045 * spread * bend
    assert outcome.value == pytest.approx(value, rel=1e-6)
    slope = -0.3 * signal + 0.045 * (noisy * bend + trace * spread)
    torch.testing.assert_close(slopes(outcome), chain(outcome, slope), rtol=1e-5, atol=1e-9)
    assert outcome.passes == 2 + 6 + 3


def test_the_published_objective_agrees_with_the_expected_one_over_many_keys():
    """The gain is the same; the published slope is half, because the projected gradient is held constant."""
    model = Bowl()
    point = point_on(model, tuner_of(model), lr=1e-6, other=0)
    closed = Expected()(point)
    runs = [OneStepLoss()(replace(point, key=Key(2, step))) for step in range(150)]
    gains = torch.tensor([run.value - model(0).item() for run in runs], dtype=torch.float64)
    assert abs(gains.mean().item() - closed.value) < 4 * gains.std().item() / len(runs) ** 0.5
    gradients = torch.stack([slopes(run) for run in runs])
    error = gradients.std(0) / len(runs) ** 0.5
    assert torch.all((2 * gradients.mean(0) - slopes(closed)).abs() < 4 * 2 * error)
    assert torch.all(2 * error < 0.5 * slopes(closed).abs())


def test_the_ratio_is_its_formula_and_blind_to_the_scale_of_sigma():
    model, draw = Bowl(), torch.Generator().manual_seed(0)
    energies, signal, noisy, trace = torch.rand(4, 5, generator=draw, dtype=torch.float64) + 0.1
    form = log_progress_rate(energies, signal, noisy, trace, 0.01)
    at = energies.clone().requires_grad_()
    value = torch.log(at @ trace) + torch.log(at @ noisy) - 2 * torch.log(at @ signal)
    value.backward()
    assert at.grad is not None
    assert form.value == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(form.slope, at.grad)
    assert log_progress_rate(3.7 * energies, signal, noisy, trace, 0.01).value == pytest.approx(form.value, rel=1e-12)
    outcome = LogProgressRate()(point_on(model, tuner_of(model), other=0))
    sigma = torch.tensor(outcome.report.estimates[0].direction.sigma, dtype=torch.float64)
    along = torch.dot(sigma, slopes(outcome)).item()
    assert abs(along) < 1e-6 * torch.sum(sigma * slopes(outcome).abs()).item()


def test_the_ratio_does_not_depend_on_the_learning_rate():
    model = Bowl()
    values = [LogProgressRate()(point_on(model, tuner_of(model), lr=lr)).value for lr in (1e-3, 1e-1)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_gain_that_seems_negative_counts_as_its_floor_and_keeps_its_slope():
    one = torch.ones(2, dtype=torch.float64)
    form = log_progress_rate(one, torch.tensor([-3.0, 1.0], dtype=torch.float64), one, one, 0.25)
    assert form.value == pytest.approx(2 * torch.log(torch.tensor(2.0)).item() - 2 * torch.log(torch.tensor(0.5)).item())
    assert form.slope[0] > form.slope[1]
    with pytest.raises(FloatingPointError, match="nan"):
        log_progress_rate(one, torch.tensor([float("nan"), 1.0], dtype=torch.float64), one, one, 0.25)


def test_the_ratio_averages_over_the_points_of_a_task():
    now = [{"signal": torch.tensor([value], dtype=torch.float64)} for value in (2.0, 4.0)]
    first = averaged({}, now[0], 0.5)
    assert first["signal"].item() == 2.0
    second = averaged(first, now[1], 0.5)
    assert second["signal"].item() == pytest.approx((2.0 * 0.25 + 4.0 * 0.5) / 0.75)
    model = Bowl()
    point = point_on(model, tuner_of(model))
    before = LogProgressRate(decay=0.5)(point).memory
    after = LogProgressRate(decay=0.5)(replace(point, other=point.closure, memory=before)).memory
    torch.testing.assert_close(after["signal"], (inner(model, None, 0, 1) + 2 * inner(model, None, 0, 0)) / 3)


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
def test_the_slope_through_the_normaliser_is_that_of_the_normalised_step(inside: Tensor | None):
    """-lr * sum lambda G with lambda = factor^2 sigma^2 and the energy's factor, which no overall scale changes."""
    model = Bowl()
    outcome = Expected(through_normaliser=True)(point_on(model, tuner_of(model, inside)))
    direction, products = outcome.report.estimates[0].direction, inner(model, inside, 0, 1)
    scales = torch.tensor([*direction.sigma, *direction.basis_sigma[:1]], dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([30.0, 4.0, 30.0][: len(scales)], dtype=torch.float64)
    energies = 34.0 / torch.sum(sizes * scales**2) * scales**2
    (exact,) = torch.autograd.grad(-1e-2 * torch.sum(energies * products), scales)
    torch.testing.assert_close(slopes(outcome), exact, rtol=1e-5, atol=1e-8)
    assert torch.dot(scales.detach(), slopes(outcome)).abs() < 1e-5 * (scales.detach() * slopes(outcome)).abs().sum()


def test_closed_forms_hand_on_the_gradient_at_theta():
    model = Bowl()
    taken: dict[int, Tensor] = {}
    Expected()(point_on(model, tuner_of(model), consume=taken.__setitem__))
    for index, gradient in enumerate(model.gradient(0)):
        torch.testing.assert_close(taken[index], gradient, rtol=1e-9, atol=1e-9)
