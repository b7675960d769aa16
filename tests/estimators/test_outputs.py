"""The outputs that a loss is made of, found from outside, and its gradient with respect to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM
from torch import Tensor, nn
from torch.nn import functional

from l2l.estimators import Outputs, finite_loss
from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters


def watched(closure: Callable[[], Tensor | float]) -> Outputs:
    outputs = Outputs()
    finite_loss(lambda: outputs.during(closure))
    return outputs


class Residual(nn.Module):
    """After its last weight is read, the loss needs what was there before as well; and a mask, and labels."""

    x: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(4, 5, generator=draw))
        self.second = nn.Parameter(torch.randn(4, 4, generator=draw))
        self.register_buffer("x", torch.randn(6, 5, generator=draw))

    def parts(self) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.x @ self.first.t())
        return hidden, functional.linear(hidden, self.second)

    def loss(self, hidden: Tensor, last: Tensor) -> Tensor:
        scores = (hidden + last).detach() if not last.requires_grad else hidden + last
        picked = torch.zeros_like(scores)
        picked[:, 1:] = scores[:, 1:]
        return (picked.logsumexp(-1) - scores.masked_fill(scores > 1, 0.5).mean(-1)).mean()

    def forward(self) -> Tensor:
        return self.loss(*self.parts())


def test_of_a_language_model_they_are_the_logits():
    model = TiedLM().double()
    found = watched(model)
    logits = model.head(model.norm((x := model.embed(model.tokens)) + model.attention(x))).detach().requires_grad_()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), model.tokens[:, 1:].flatten())
    (out,), (pull,) = found.tensors, found.gradients()
    torch.testing.assert_close(out, logits.detach())
    torch.testing.assert_close(pull, torch.autograd.grad(loss, logits)[0], rtol=1e-9, atol=1e-12)


def test_what_the_last_layer_does_not_give_is_an_output_as_well():
    model = Residual().double()
    found = watched(model)
    hidden, last = (part.detach().requires_grad_() for part in model.parts())
    wanted = torch.autograd.grad(model.loss(hidden, last), (hidden, last))
    assert len(found.tensors) == 2
    for out, part, pull, own in zip(found.tensors, (hidden, last), found.gradients(), wanted, strict=True):
        torch.testing.assert_close(out, part.detach())
        torch.testing.assert_close(pull, own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("make", [TiedLM, Residual, LogisticRegression])
def test_there_are_the_same_ones_away_from_home_and_theta_is_walked(make: type[nn.Module], walk):
    model = make().double()
    home, away, theta = watched(model), Outputs(), PerturbedParameters(Blocks.of(model), walk)
    epsilon, u = 1e-5, Direction(Key(3), (1.0,) * len(Blocks.of(model)))
    with theta.step():
        theta.perturb(u, epsilon)
        plus = theta.evaluate(lambda: finite_loss(lambda: away.during(model)))
    slope = (plus - finite_loss(model)) / epsilon
    total = 0.0
    for here, there, pull in zip(home.tensors, away.tensors, home.gradients(), strict=True):
        total += (pull * (there - here)).sum().item() / epsilon
    assert total == pytest.approx(slope, rel=1e-3)
    assert total != slope


def test_a_weight_that_is_read_as_a_view_or_in_another_dtype_is_no_output():
    weight, x = nn.Parameter(torch.randn(3, 4)), torch.randn(5, 4)
    found = watched(lambda: (x.double() @ weight.view(12).view(3, 4).double().t()).square().sum())
    assert [tuple(out.shape) for out in found.tensors] == [(5, 3)]


def test_where_parameters_alone_make_the_loss_it_is_the_output():
    found = watched(Quadratic().double())
    assert [out.numel() for out in found.tensors] == [1]
    assert found.gradients()[0].item() == 1


@pytest.mark.parametrize("gives", [lambda loss: loss.item(), lambda loss: 2.5])
def test_behind_a_float_it_is_the_loss(gives: Callable[[Tensor], float]):
    model = TiedLM().double()
    found = watched(lambda: gives(model()))
    assert [out.numel() for out in found.tensors] == [1]
    assert found.gradients()[0].item() == 1


@pytest.mark.parametrize("wrap", [lambda model: model().detach(), lambda model: model() * 1])
def test_a_loss_that_is_detached_or_computed_in_inference_mode_has_its_gradient(wrap):
    model = TiedLM()
    wanted = watched(model).gradients()[0]
    torch.testing.assert_close(watched(lambda: wrap(model)).gradients()[0], wanted)

    def inferred() -> Tensor:
        with torch.inference_mode():
            return wrap(model)

    torch.testing.assert_close(watched(inferred).gradients()[0], wanted)


def test_outputs_that_the_loss_overwrites_are_refused():
    model = LogisticRegression()

    def overwriting() -> Tensor:
        scores = model.linear(model.x)
        worst = scores.max()
        return worst + scores.clamp_(-1, 1).sum()

    with pytest.raises(RuntimeError, match="the loss changes the model's outputs in place"):
        watched(overwriting).gradients()


def test_nothing_is_left_of_gradients_and_the_parameters_stay_as_they_were():
    model = TiedLM()
    found = watched(model)
    found.gradients()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(out.requires_grad for out in found.tensors)
