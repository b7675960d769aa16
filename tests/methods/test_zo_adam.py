"""ZO-Adam: against torch's own Adam on dense estimates, and as the element-wise sign."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, Loss, Weights, assert_near, assert_same_run, normal, run, two_sided
from torch import nn

from l2l.methods.adam import Adam
from l2l.methods.sign import Sign
from l2l.noise import Key
from l2l.optim import ZOOptimizer


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


class TorchAdam:
    """The mean estimate written into ``grad``, and one step of torch's optimizer over all tensors."""

    def __init__(self, at: Weights, num_directions: int) -> None:
        self.parameters, self.num_directions = (
            {name: nn.Parameter(value.clone()) for name, value in at.items()},
            num_directions,
        )
        self.optimizer = torch.optim.Adam(self.parameters.values(), LR)

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        self.optimizer.zero_grad(set_to_none=False)
        for draw in range(self.num_directions):
            u = {name: normal(name, key.with_draw(draw), *value.shape) for name, value in at.items()}
            g = two_sided(loss, at, u) / self.num_directions
            for name, parameter in self.parameters.items():
                parameter.grad = g * u[name] + (0 if parameter.grad is None else parameter.grad)
        self.optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


@pytest.mark.parametrize("num_directions", [1, 3])
def test_it_takes_the_steps_of_torch_adam_on_the_estimates(model: nn.Module, num_directions: int):
    assert_same_run(model, Adam(EPSILON, num_directions), TorchAdam(weights(model), num_directions).step)


def test_with_zero_betas_it_is_the_elementwise_sign(model: nn.Module):
    other = type(model)().double()
    run(model, Adam(EPSILON, beta1=0.0, beta2=0.0, eps=1e-30), 20)
    run(other, Sign(EPSILON), 20)
    assert_near(weights(model), weights(other))


def test_half_precision_weights_have_their_means_in_float32():
    model = TiedLM().bfloat16()
    optimizer = ZOOptimizer(model, Adam(), LR)
    optimizer.step(model)
    state = optimizer.method_state
    assert {tensor.dtype for tensor in (*state.mean, *state.square)} == {torch.float32}


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_beta_outside_of_0_to_1_is_refused(name: str, value: float):
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 0 and below 1"):
        Adam(**wrong)


def test_an_eps_of_zero_and_lr_auto_are_refused():
    with pytest.raises(ValueError, match=r"eps=0\.0 must be positive and finite"):
        Adam(eps=0.0)
    with pytest.raises(ValueError, match="give lr as a number"):
        ZOOptimizer(Quadratic(), Adam(), "auto")
