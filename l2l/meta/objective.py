"""What a tuner is trained for: the loss after one zeroth-order step, as a function of sigma.

ZO Fine-tuner, arXiv:2510.00419. With c = (L+ - L-) / (2 epsilon), the step lands at
theta'_b = theta_b - lr * c * factor * sigma_b * z_b, and d L(theta') / d sigma_b = -lr * c * factor * <z_b, grad_b L(theta')>
with c, factor and z held constant. So no graph over the parameters and no copy of the model is needed: the step is taken
in place, one backward pass hands over each block's gradient as it completes, its inner product with the regenerated noise
is taken, it is freed, and the step is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure
from l2l.finetune.step import StepReport, zo_step
from l2l.methods.learned import Learned
from l2l.noise import Gather, Key, Piece, Term, standard_deviation, traverse
from l2l.perturb import Direction, Theta
from l2l.tuners.features import History

WAITING = 32
"""One in so many coordinates of the model may wait in gradients for a common traversal: few calls, little memory."""


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


def one_step(
    closure: Closure,
    theta: Theta,
    method: Learned,
    history: History,
    key: Key,
    lr: float,
    consume: Callable[[int, Tensor], None] | None = None,
) -> OneStep:
    """Take the deployed step, differentiate the loss behind it in sigma, and step back.

    Args:
        closure: loss of one batch, with a graph where gradients are enabled.
        method: the learned method with the tuner as it is now; one draw.
        lr: learning rate of the inner step.
        consume: called with each block's index and gradient behind the step, for whoever can use that backward pass too.

    Raises:
        FloatingPointError: a loss is not finite; theta is back where it was, as after any other error.
    """
    history = history.at(theta.blocks)  # the trajectory has moved them since
    features = method.tuner.features(history)
    following, report = zo_step(closure, theta, method, history, key, [lr] * len(theta.blocks))
    estimate = report.estimates[0]
    direction, amount = estimate.direction, lr * estimate.projected_gradient
    dots = NoiseDots(theta.blocks, direction)

    def take(index: int, gradient: Tensor) -> None:
        dots.take(index, gradient)
        if consume is not None:
            consume(index, gradient)

    try:
        theta.deliver()
        loss_after = consume_gradients(closure, theta.blocks, take)
    finally:
        with theta.step():
            theta.add(direction, [amount] * len(theta.blocks))
    sigma_gradient = (-amount * direction.factor * dots.values()).float()
    return OneStep(features, sigma_gradient, loss_after, following, report)


@final
class NoiseDots:
    """Inner products <z_b, gradient_b> of the blocks' gradients with the noise of a direction, which is made anew."""

    def __init__(self, blocks: Blocks, direction: Direction) -> None:
        self._names = blocks.names
        self._most = blocks.numel // WAITING
        self._direction = direction
        self._found = np.zeros(len(blocks))
        self._waiting: dict[int, Tensor] = {}

    def take(self, index: int, gradient: Tensor) -> None:
        """Note a block's gradient. It is held until enough have come, or until :meth:`values` is asked for."""
        self._waiting[index] = gradient
        if sum(waiting.numel() for waiting in self._waiting.values()) > self._most:
            self._traverse()

    def values(self) -> Tensor:
        """[blocks] float64; zero where no gradient came."""
        self._traverse()
        return torch.from_numpy(self._found)

    def _traverse(self) -> None:
        pieces = [Piece(gradient.reshape(-1), self._names[i]) for i, gradient in self._waiting.items()]
        kind, nowhere = self._direction.distribution, [0.0] * len(pieces)
        term = Term(self._direction.key, [(0.0,)] * len(pieces), kind)
        sums = traverse(pieces, [term], Gather(nowhere, nowhere), store=False)
        assert sums is not None, "sums were asked for"
        self._found[list(self._waiting)] = sums.du / standard_deviation(kind)
        self._waiting.clear()
