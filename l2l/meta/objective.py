"""What a tuner is trained for: the loss after one zeroth-order step, as a function of sigma.

ZO Fine-tuner, arXiv:2510.00419. With c = (L+ - L-) / (2 epsilon), the step lands at
theta'_b = theta_b - lr * c * factor * sigma_b * z_b, and d L(theta') / d sigma_b = -lr * c * factor * <z_b, grad_b L(theta')>
with c, factor and z held constant. So no graph over the parameters and no copy of the model is needed: the step is taken
in place, one backward pass hands over each block's gradient as it completes, its inner product with the regenerated noise
is taken, it is freed, and the step is undone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure
from l2l.finetune.step import StepReport, zo_step
from l2l.methods.learned import Learned
from l2l.noise import Key, noise_dot
from l2l.perturb import Theta
from l2l.tuners.features import History


@dataclass(frozen=True)
class OneStep:
    """Outcome of the objective at one batch."""

    features: Tensor
    """[blocks, features] that the tuner saw at theta."""
    sigma_gradient: Tensor
    """[blocks] float32: derivative of the loss after the step in sigma before normalisation."""
    loss_after: float
    """The meta-loss: loss of the batch after the step."""
    history: History
    """What the next step on this task remembers."""
    report: StepReport
    """The step, as in fine-tuning."""


def one_step(closure: Closure, theta: Theta, method: Learned, history: History, key: Key, lr: float) -> OneStep:
    """Take the deployed step, differentiate the loss behind it in sigma, and step back.

    Args:
        closure: loss of one batch, with a graph where gradients are enabled.
        method: the learned method with the tuner as it is now; one draw.
        lr: learning rate of the inner step.

    Raises:
        FloatingPointError: a loss is not finite; theta is back where it was, as after any other error.
    """
    features = method.tuner.features(theta.blocks, history)
    following, report = zo_step(closure, theta, method, history, key, [lr] * len(theta.blocks))
    estimate = report.estimates[0]
    direction, amount = estimate.direction, lr * estimate.projected_gradient
    dots = torch.zeros(len(theta.blocks), dtype=torch.float64)

    def take(index: int, gradient: Tensor) -> None:
        name = theta.blocks[index].name
        dots[index] = noise_dot(gradient.reshape(-1), name, direction.key, direction.distribution)

    try:
        loss_after = consume_gradients(closure, theta.blocks, take)
    finally:
        with theta.step():
            theta.add(direction, [amount] * len(theta.blocks))
    sigma_gradient = (-amount * direction.factor * dots).float()
    return OneStep(features, sigma_gradient, loss_after, following, report)
