"""Forward-Grad: the derivative is exact, costs two passes, holds nothing, and refuses what it cannot differentiate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, SEED, Loss, Weights, assert_near, assert_same_run, moved, normal, run
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from l2l.estimators import forward_gradient
from l2l.methods.forward_grad import ForwardGrad
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import CurvatureLR, ZOOptimizer
from l2l.params import Direction


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


def gradient_of(model: nn.Module, at: Weights) -> Weights:
    """By backpropagation."""
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    found = torch.autograd.grad(functional_call(model, leaves, (), tie_weights=True), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("num_directions", [1, 3])
def test_it_takes_the_steps_of_the_paper(model: nn.Module, num_directions: int):
    def dense(loss: Loss, at: Weights, key: Key) -> Weights:
        gradient, following = gradient_of(model, at), at
        for draw in range(num_directions):
            u = {name: normal(name, key.with_draw(draw), *value.shape) for name, value in at.items()}
            slope = sum((gradient[name] * u[name]).sum().item() for name in at)
            following = moved(following, -LR * slope / num_directions, u)
        return following

    assert_same_run(model, ForwardGrad(num_directions=num_directions), dense)


def test_mezo_with_a_small_epsilon_is_nearly_it(model: nn.Module):
    other = type(model)().double()
    run(model, ForwardGrad(), 10)
    run(other, MeZO(1e-5), 10)
    assert_near(weights(model), weights(other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_directions", [1, 2])
def test_an_evaluation_with_tangents_counts_as_two_passes(num_directions: int):
    model, calls = TiedLM(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model()

    optimizer = ZOOptimizer(model, ForwardGrad(num_directions=num_directions), LR)
    optimizer.step(closure)
    assert optimizer.report is not None
    assert (calls, optimizer.report.passes, ForwardGrad(num_directions=num_directions).passes) == (
        num_directions,
        2 * num_directions,
        2 * num_directions,
    )


def test_no_graph_is_built_though_gradients_are_on():
    model, seen = TiedLM(), []

    def closure() -> Tensor:
        loss = model()
        seen.append((torch.is_grad_enabled(), loss.requires_grad))
        return loss

    ZOOptimizer(model, ForwardGrad(), LR).step(closure)
    assert seen == [(True, False)]


def test_sparse_embeddings_move_the_rows_that_were_read():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 3)
            self.out = nn.Linear(3, 2)

        def forward(self) -> Tensor:
            return functional.cross_entropy(self.out(self.embed(torch.tensor([1, 4, 4]))), torch.tensor([0, 1, 1]))

    torch.manual_seed(0)
    model = Bag().double()
    whole = Bag().double()
    whole.load_state_dict(model.state_dict())
    before = model.embed.weight.detach().clone()
    ZOOptimizer(model, ForwardGrad(), LR, SEED, sparse_embeddings=True).step(model)
    ZOOptimizer(whole, ForwardGrad(), LR, SEED).step(whole)
    rows = (model.embed.weight != before).any(1).nonzero().flatten().tolist()
    assert rows == [1, 4]
    torch.testing.assert_close(model.embed.weight[rows], whole.embed.weight[rows])
    torch.testing.assert_close(model.out.weight, whole.out.weight)


def test_half_precision_slopes_are_near_those_of_the_same_weights_in_float32():
    half = TiedLM().bfloat16()
    whole = TiedLM().bfloat16().float()
    slopes = []
    for model in (half, whole):
        optimizer = ZOOptimizer(model, ForwardGrad(num_directions=8), 1e-9, SEED)
        optimizer.step(lambda model=model: model().float())
        assert optimizer.report is not None
        slopes.append(torch.tensor([seen.projected_gradient for seen in optimizer.report.estimates]))
    assert torch.linalg.vector_norm(slopes[0] - slopes[1]) < 0.05 * torch.linalg.vector_norm(slopes[1])


def test_it_may_be_given_lr_auto():
    left, right = Quadratic().double(), Quadratic().double()
    control = CurvatureLR(every=1, warm_up=0)
    one, other = (ZOOptimizer(m, k, "auto", SEED, curvature_lr=control) for m, k in ((left, ForwardGrad()), (right, MeZO())))
    one.step(left)
    other.step(right)
    assert one.report is not None and other.report is not None
    assert one.report.curvature == pytest.approx(other.report.curvature, rel=1e-4)
    assert one.report.passes == 2 + 2


@pytest.mark.parametrize("value", [lambda model: model().item(), lambda model: model().detach(), lambda _: torch.tensor(1.0)])
def test_a_loss_without_a_derivative_is_refused(value: Any):
    model = TiedLM().double()
    before, optimizer = weights(model), ZOOptimizer(model, ForwardGrad(), LR)
    with pytest.raises(ValueError, match=r"carries no derivative .* use objective loss, or a method that only compares"):
        optimizer.step(lambda: value(model))
    assert_near(weights(model), before)


def test_a_quantised_weight_is_refused():
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
            self.free = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return (self.frozen.float() @ self.free).sum()

    model = Quantised()
    with pytest.raises(ValueError, match=r"a weight of shape \(3, 3\) is quantised"):
        ZOOptimizer(model, ForwardGrad(), LR).step(model)


def test_an_operation_without_a_forward_rule_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 2

    model = Quadratic()
    optimizer = ZOOptimizer(model, ForwardGrad(), LR)
    with pytest.raises(ValueError, match="no forward-mode rule"):
        optimizer.step(lambda: Opaque.apply(model()))  # pyright: ignore[reportArgumentType]


def test_a_derivative_that_is_not_finite_is_refused():
    model = Quadratic()
    optimizer = ZOOptimizer(model, ForwardGrad(), LR)
    with pytest.raises(FloatingPointError, match="the derivative along the direction is"):
        optimizer.step(lambda: (model.vector[0] * 0).sqrt() + model())


def test_the_estimate_says_that_it_was_taken_at_theta():
    model = Quadratic().double()
    theta = ZOOptimizer(model, ForwardGrad(), LR).theta
    at_theta = model().item()
    with theta.step():
        seen = forward_gradient(model, theta, Direction(Key(0), (1.0, 1.0)))
    assert (seen.loss, seen.loss_plus, seen.loss_minus, seen.loss_center) == (at_theta, at_theta, None, at_theta)
    assert ForwardGrad().epsilon == EPSILON
