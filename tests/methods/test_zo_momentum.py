"""ZO-SGD-MMT: against dense steps and torch's own SGD, and as MeZO."""

from __future__ import annotations

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, Loss, Weights, assert_near, assert_same_run, normal, run, two_sided
from torch import nn

from l2l.methods.mezo import MeZO
from l2l.methods.momentum import Momentum
from l2l.noise import Key


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


class TorchSGD:
    """The estimate written into ``grad``, and a step of torch's optimizer."""

    def __init__(self, at: Weights, momentum: float) -> None:
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in at.items()}
        self.optimizer = torch.optim.SGD(self.parameters.values(), LR, momentum=momentum)

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        u = {name: normal(name, key, *value.shape) for name, value in at.items()}
        g = two_sided(loss, at, u)
        for name, parameter in self.parameters.items():
            parameter.grad = g * u[name]
        self.optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_it_takes_the_steps_of_torch_sgd_on_the_estimates(model: nn.Module, momentum: float):
    dense = TorchSGD(weights(model), momentum)
    assert_same_run(model, Momentum(EPSILON, momentum=momentum), dense.step)


@pytest.mark.parametrize("num_directions", [1, 3])
def test_momentum_0_is_mezo(model: nn.Module, num_directions: int):
    other = type(model)().double()
    run(model, Momentum(EPSILON, num_directions, momentum=0.0), 20)
    run(other, MeZO(EPSILON, num_directions), 20)
    assert_near(weights(model), weights(other))


def test_the_first_step_is_mezos_whatever_the_momentum(model: nn.Module):
    other = type(model)().double()
    run(model, Momentum(EPSILON), 1)
    run(other, MeZO(EPSILON), 1)
    assert_near(weights(model), weights(other))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_outside_of_0_to_1_is_refused(momentum: float):
    with pytest.raises(ValueError, match=f"momentum={momentum} must be at least 0 and below 1"):
        Momentum(momentum=momentum)
