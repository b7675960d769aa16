"""Differences to one side, which share the loss at theta; and the ways to look that a method is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, farthest, weights
from torch import Tensor, nn

from l2l.estimators import Closure, center_loss, finite_loss, loss_along, one_sided, two_point
from l2l.methods.base import LossEvaluator
from l2l.noise import Key, standard_noise
from l2l.params import Blocks, Direction, PerturbedParameters


def direction(model: nn.Module, draw: int = 0) -> Direction:
    sigma = tuple(0.5 + 0.25 * i for i in range(len(Blocks.of(model))))
    return Direction(Key(5, 1, draw), sigma, factor=0.7)


def dense(model: nn.Module, u: Direction, of: dict[str, Tensor]) -> float:
    """The sum of <of_b, u_b>."""
    total = 0.0
    for name, sigma in zip(Blocks.of(model).names, u.sigma, strict=True):
        z = standard_noise(name, u.key, of[name].shape, u.distribution, torch.float64)
        total += u.factor * sigma * (of[name] * z).sum().item()
    return total


def slope(model: nn.Module, u: Direction) -> float:
    """<gradient, u> by autograd and materialised noise."""
    blocks = Blocks.of(model)
    found = torch.autograd.grad(model(), [block.tensor for block in blocks])
    return dense(model, u, dict(zip(blocks.names, found, strict=True)))


def halved(u: Direction) -> Direction:
    return replace(u, sigma=tuple(0.5 * sigma for sigma in u.sigma))


def watched(closure: nn.Module) -> tuple[Closure, list[dict[str, Tensor]]]:
    seen: list[dict[str, Tensor]] = []

    def looking() -> Tensor:
        seen.append(weights(closure))
        return closure()

    return looking, seen


@pytest.mark.parametrize("make", [Quadratic, LogisticRegression, TiedLM])
def test_the_error_falls_by_two_when_epsilon_halves(make: type[nn.Module]):
    model = make().double()
    theta, u, wanted = PerturbedParameters(Blocks.of(model)), direction(model), slope(model, direction(model))
    errors = []
    for epsilon in (4e-3, 2e-3, 1e-3):
        with theta.step():
            errors.append(abs(one_sided(model, theta, [u], epsilon)[0].projected_gradient - wanted))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_on_a_quadratic_the_bias_is_half_epsilon_times_the_curvature():
    model = Quadratic().double()
    theta, u, epsilon = PerturbedParameters(Blocks.of(model)), direction(model), 0.1
    z = {n: standard_noise(n, u.key, v.shape, dtype=torch.float64) for n, v in weights(model).items()}
    scale = dict(zip(z, u.sigma, strict=True))
    bend = {"matrix": model.curvature, "vector": torch.ones(6, dtype=torch.float64)}
    curvature = sum((bend[n] * (u.factor * scale[n] * z[n]) ** 2).sum().item() for n in z)
    with theta.step():
        seen = one_sided(model, theta, [u], epsilon)[0]
    assert seen.projected_gradient == pytest.approx(slope(model, u) + epsilon / 2 * curvature, rel=1e-9)


def test_several_directions_share_one_loss_at_theta():
    model = TiedLM().double()
    theta, (closure, seen), start = PerturbedParameters(Blocks.of(model)), watched(model), weights(model)
    with theta.step():
        estimates = one_sided(closure, theta, [direction(model, draw) for draw in range(3)], 1e-3)
    assert len(seen) == 4
    assert farthest(seen[0], start) < 1e-12
    assert farthest(weights(model), start) < 1e-12
    assert len({estimate.loss_center for estimate in estimates}) == 1
    assert all(estimate.loss_minus is None for estimate in estimates)
    assert all(estimate.losses == (estimate.loss_plus, estimate.loss_center) for estimate in estimates)


def test_a_loss_at_theta_that_is_known_is_not_asked_for_again():
    model = TiedLM().double()
    theta, (closure, seen) = PerturbedParameters(Blocks.of(model)), watched(model)
    home = finite_loss(model)
    with theta.step():
        given = one_sided(closure, theta, [direction(model)], 1e-3, home)
    with theta.step():
        asked = one_sided(model, theta, [direction(model)], 1e-3)
    assert len(seen) == 1
    assert given[0].projected_gradient == pytest.approx(asked[0].projected_gradient, rel=1e-6)


def test_the_loss_at_theta_is_read_with_every_move_made():
    model = Quadratic().double()
    theta, u = PerturbedParameters(Blocks.of(model)), direction(model)
    with theta.step():
        loss_along(model, theta, u, 0.5)
        theta.add(u, [-0.25] * len(theta.blocks))
        seen = center_loss(model, theta)
    assert seen == pytest.approx(finite_loss(model), rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_loss_that_is_not_finite_is_no_estimate(value: float, failing_call: int):
    model, calls = Quadratic().double(), 0
    theta, start = PerturbedParameters(Blocks.of(model)), weights(model)

    def broken() -> Tensor | float:
        nonlocal calls
        calls += 1
        return value if calls == failing_call else model()

    with pytest.raises(FloatingPointError, match="the loss is"), theta.step():
        one_sided(broken, theta, [direction(model)], 1e-3)
    assert farthest(weights(model), start) < 1e-12


def test_all_evaluations_of_an_evaluator_are_transformed():
    model = TiedLM().double()
    theta, u = PerturbedParameters(Blocks.of(model)), direction(model)
    evaluator = LossEvaluator(theta, u.key, model, halved)
    with theta.step():
        along = evaluator.along(u, 1e-3)
        both = evaluator.two_point(u, 1e-3)
        one = evaluator.one_sided([u], 1e-3, loss_center=evaluator.center())[0]
    with theta.step():
        plain = two_point(model, theta, halved(u), 1e-3)
    assert both.direction == one.direction == halved(u)
    assert (along, one.loss_plus, both.loss_plus) == pytest.approx((plain.loss_plus,) * 3, rel=1e-12)
    assert both.projected_gradient == pytest.approx(plain.projected_gradient, rel=1e-7)


def test_a_sight_through_another_aims_with_the_inner_first():
    model, order = Quadratic().double(), []

    def aimed(name: str):
        def aim(u: Direction) -> Direction:
            order.append(name)
            return halved(u)

        return aim

    theta, u = PerturbedParameters(Blocks.of(model)), direction(model)
    evaluator = LossEvaluator(theta, u.key, model, aimed("outer")).with_transform(aimed("inner"))
    with theta.step():
        seen = evaluator.two_point(u, 1e-3)
    assert order == ["inner", "outer"]
    assert seen.direction == halved(halved(u))
