"""What dense oracles share: a method's run in float64 beside steps that are written out with materialised noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.base import Method
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]
Loss = Callable[[Weights], float]


def loss_of(model: nn.Module) -> Loss:
    return lambda at: functional_call(model, at, (), tie_weights=True).item()


def normal(name: str, key: Key, *shape: int) -> Tensor:
    """The block's own noise, or that of a thin matrix: ``name#what``."""
    return standard_noise(name, key, torch.Size(shape), dtype=torch.float64)


def moved(at: Weights, by: float, u: Weights) -> Weights:
    return {name: value + by * u[name] for name, value in at.items()}


def two_sided(loss: Loss, at: Weights, u: Weights) -> float:
    return (loss(moved(at, EPSILON, u)) - loss(moved(at, -EPSILON, u))) / (2 * EPSILON)


def run(model: nn.Module, method: Method[Any], steps: int = 10, seed: int = SEED, lr: float = LR) -> ZOOptimizer:
    optimizer = ZOOptimizer(model, method, lr, seed)
    for _ in range(steps):
        optimizer.step(model)
    return optimizer


def assert_same_run(
    model: nn.Module, method: Method[Any], dense_step: Callable[[Loss, Weights, Key], Weights], steps: int = 12
) -> None:
    """The method's weights are those of the dense steps, to 1e-6, after every step."""
    loss, at = loss_of(model), weights(model)
    optimizer = ZOOptimizer(model, method, LR, SEED)
    for step in range(steps):
        optimizer.step(model)
        at = dense_step(loss, at, Key(SEED, step))
        assert_near(weights(model), at)


def assert_near(found: Weights, wanted: Weights, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=atol)
