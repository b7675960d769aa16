"""What was seen: losses along a direction, and the projected gradient they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from l2l.perturb import Direction

Closure: TypeAlias = Callable[[], Tensor | float]
"""Computes the loss at the parameters as they stand: a scalar tensor or a float."""


@dataclass(frozen=True)
class Estimate:
    """One look along one direction."""

    direction: Direction
    loss_plus: float
    """Loss at theta + epsilon * u."""
    loss_minus: float | None
    """Loss at theta - epsilon * u; None where nobody looked there."""
    projected_gradient: float
    """Estimate of <gradient, u>."""
    loss_center: float | None = None
    """Loss at theta; None where nobody looked there."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses seen around theta: at both sides, else at the one side and at theta."""
        other = self.loss_center if self.loss_minus is None else self.loss_minus
        return (self.loss_plus,) if other is None else (self.loss_plus, other)

    @property
    def loss(self) -> float:
        """Their mean."""
        return sum(self.losses) / len(self.losses)


def finite_loss(closure: Closure) -> float:
    """The closure's loss as a Python float.

    Raises:
        TypeError: the closure gave neither a scalar tensor nor a number.
        FloatingPointError: the loss is not finite; nothing is masked.
    """
    with torch.no_grad():
        return as_loss(closure())


def as_loss(value: Tensor | float) -> float:
    """A scalar tensor or number as a finite float; see :func:`read_loss`."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure returned a tensor of shape {tuple(value.shape)}; return a scalar loss")
        value = value.detach().double().item()
    if not isinstance(value, int | float):
        raise TypeError(f"the closure returned {type(value).__name__}; return a scalar tensor or a float")
    if value != value or value in (float("inf"), float("-inf")):
        raise FloatingPointError(f"the loss is {value}: lower lr or epsilon, or look for empty or overflowing inputs")
    return float(value)
