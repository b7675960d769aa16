"""The central difference: exact on quadratics, second order elsewhere."""

from __future__ import annotations

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, farthest, weights
from torch import Tensor, nn

from l2l.estimators import Closure, finite_loss, two_point
from l2l.noise import Distribution, Key, standard_noise
from l2l.params import Blocks, Direction, PerturbedParameters


def slope(model: nn.Module, u: Direction) -> float:
    """<gradient, u> by autograd and materialised noise."""
    blocks = Blocks.of(model)
    gradients = torch.autograd.grad(model(), [block.tensor for block in blocks])
    total = 0.0
    for block, sigma, gradient in zip(blocks, u.sigma, gradients, strict=True):
        z = standard_noise(block.name, u.key, gradient.shape, u.distribution, torch.float64)
        total += u.factor * sigma * (gradient * z).sum().item()
    return total


def direction(model: nn.Module, distribution: Distribution = "gaussian") -> Direction:
    sigma = tuple(0.5 + 0.25 * i for i in range(len(Blocks.of(model))))
    return Direction(Key(5, 1), sigma, distribution, factor=0.7)


def estimate(model: nn.Module, u: Direction, epsilon: float) -> float:
    theta = PerturbedParameters(Blocks.of(model))
    with theta.step():
        return two_point(model, theta, u, epsilon).projected_gradient


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 0.1, 1.0, 30.0])
def test_it_is_exact_on_a_quadratic_for_every_epsilon(epsilon: float, distribution: Distribution):
    model = Quadratic().double()
    u = direction(model, distribution)
    assert estimate(model, u, epsilon) == pytest.approx(slope(model, u), rel=1e-9)


@pytest.mark.parametrize("make", [LogisticRegression, TiedLM])
def test_off_a_quadratic_the_error_falls_by_four_when_epsilon_halves(make: type[nn.Module]):
    model = make().double()
    u = direction(model)
    wanted = slope(model, u)
    errors = [abs(estimate(model, u, epsilon) - wanted) for epsilon in (4e-2, 2e-2, 1e-2)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_it_reports_both_losses_and_calls_the_closure_twice():
    model, seen = Quadratic().double(), []

    def closure() -> Tensor:
        seen.append(model().item())
        return model()

    theta, u = PerturbedParameters(Blocks.of(model)), direction(model)
    found = two_point(closure, theta, u, 1e-2)
    assert [found.loss_plus, found.loss_minus] == seen
    assert found.projected_gradient == (seen[0] - seen[1]) / 2e-2
    assert found.direction is u


def test_it_leaves_theta_at_minus_epsilon_for_the_step_to_continue_from():
    model = Quadratic()
    before = weights(model)
    theta = PerturbedParameters(Blocks.of(model))
    two_point(model, theta, direction(model), 1e-2)
    assert farthest(before, weights(model)) > 1e-3
    theta.restore()
    assert farthest(before, weights(model)) < 1e-6


def test_no_graph_is_built():
    model = Quadratic()

    def closure() -> Tensor:
        loss = model()
        assert not loss.requires_grad
        return loss

    two_point(closure, PerturbedParameters(Blocks.of(model)), direction(model), 1e-2)


@pytest.mark.parametrize("value", [2.5, 2, torch.tensor(2.5), torch.tensor([[2.5]]), torch.tensor(2.5).half()])
def test_a_loss_is_a_number_or_a_scalar_tensor(value: Tensor | float):
    assert finite_loss(lambda: value) == float(value)
    assert type(finite_loss(lambda: value)) is float


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda: torch.zeros(3, 1), r"tensor of shape \(3, 1\); return a scalar loss"),
        (
            lambda: (torch.zeros(3), torch.zeros(3)),
            r"a tuple of \(3,\) of torch.float32, .*a tuple is \(logits \[m, K\], targets",
        ),
        (lambda: (torch.zeros(3, 2), 1), r"a tuple of \(3, 2\) of torch.float32, int"),
        (lambda: (torch.zeros(3, 2), torch.zeros(2).long()), "a tuple is"),
        (lambda: None, "returned NoneType; return a scalar tensor or a float"),
        (lambda: "1.0", "returned str"),
    ],
)
def test_anything_else_is_refused(closure: Closure, message: str):
    with pytest.raises(TypeError, match=message):
        finite_loss(closure)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor(-float("inf"))])
def test_a_loss_that_is_not_finite_is_never_masked(value: Tensor | float):
    with pytest.raises(FloatingPointError, match=r"the loss is .*: lower lr or epsilon"):
        finite_loss(lambda: value)
