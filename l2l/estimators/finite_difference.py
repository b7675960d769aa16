"""Projected gradients from differences of losses: two-sided (SPSA, exact on quadratics) and one-sided.

A loss that is not finite raises FloatingPointError, and one that is no scalar TypeError: see :func:`finite_loss`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch

from l2l.noise import Key
from l2l.params import Direction, PerturbedParameters

Closure: TypeAlias = Callable[[], torch.Tensor | float]
"""Computes the loss at the present parameters: a scalar tensor or a float."""


@dataclass(frozen=True)
class Estimate:
    """Losses along one direction, and the projected gradient they give."""

    direction: Direction
    loss_plus: float
    """Loss at theta + epsilon * u."""
    loss_minus: float | None
    """Loss at theta - epsilon * u; None where it was not evaluated."""
    projected_gradient: float
    """Estimate of <gradient, u>."""
    loss_center: float | None = None
    """Loss at theta; None where it was not evaluated."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses evaluated: at both sides, else at the one side and at theta."""
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


def as_loss(value: torch.Tensor | float) -> float:
    """A scalar tensor or number as a finite float; errors as of :func:`finite_loss`."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure returned a tensor of shape {tuple(value.shape)}; return a scalar loss")
        value = value.detach().double().item()
    if not isinstance(value, int | float):
        raise TypeError(f"the closure returned {type(value).__name__}; return a scalar tensor or a float")
    if value != value or value in (float("inf"), float("-inf")):
        raise FloatingPointError(f"the loss is {value}: lower lr or epsilon, or look for empty or overflowing inputs")
    return float(value)


@final
@dataclass(frozen=True)
class MicroBatched:
    """A closure that adds up pieces; each is weighted already, so that the sum is the loss of the whole batch.

    Where gradients are off, as in forward passes only, each piece's activations are freed before the next begins.
    A backward pass reads ``pieces`` and goes back through each by itself; one through the sum keeps them all.
    """

    pieces: tuple[Closure, ...]
    whole: Closure | None = None
    """Adds them up in its own way; None: one after the other."""

    def __call__(self) -> torch.Tensor | float:
        if self.whole is not None:
            return self.whole()
        first, *rest = self.pieces
        total = first()
        for piece in rest:
            total = total + piece()
        return total


def pieces_of(closure: Closure) -> tuple[Closure, ...]:
    """What adds up to the closure's loss: the closure itself where it is not micro-batched."""
    return closure.pieces if isinstance(closure, MicroBatched) else (closure,)


def two_point(closure: Closure, theta: PerturbedParameters, direction: Direction, epsilon: float) -> Estimate:
    """g = (L+ - L-) / (2 epsilon) from the losses at ``theta +- epsilon * u``: an estimate of <grad L, u>.

    Two forward passes. Theta is left at ``-epsilon * u``, so that a step along the same direction costs no extra
    traversal; :meth:`PerturbedParameters.restore` or the end of the step brings it back.
    Spall 1992 (SPSA); Malladi et al. 2023, arXiv:2305.17333, Definition 1.
    """
    theta.perturb(direction, epsilon)
    plus = theta.evaluate(lambda: finite_loss(closure))
    theta.perturb(direction, -epsilon)
    minus = theta.evaluate(lambda: finite_loss(closure))
    return Estimate(direction, plus, minus, (plus - minus) / (2 * epsilon))


def center_loss(closure: Closure, theta: PerturbedParameters, direction: Direction | None = None) -> float:
    """The loss at theta. One forward pass; before :func:`two_point` it costs a traversal less than after.

    Half-precision weights are read as perturbed copies at distance 0: norms and biases then have the same float32 values
    as on either side, not rounded ones, whose loss would not lie between those of the two sides.

    Args:
        direction: along which the evaluations before and after are made, if there are any; it does not change the loss.
    """
    if theta.update is None:
        theta.restore()
    else:
        theta.perturb(direction or Direction(Key(0), (0.0,) * len(theta.blocks)), 0.0)
    return theta.evaluate(lambda: finite_loss(closure))


def loss_along(closure: Closure, theta: PerturbedParameters, direction: Direction, distance: float) -> float:
    """The loss at ``theta + distance * u``. One forward pass; theta is left there."""
    theta.perturb(direction, distance)
    return theta.evaluate(lambda: finite_loss(closure))


def one_sided(
    closure: Closure, theta: PerturbedParameters, directions: Sequence[Direction], epsilon: float, center: float | None = None
) -> tuple[Estimate, ...]:
    """g = (L+ - L0) / epsilon along each direction, with one loss at theta for all of them.

    One forward pass per direction, and one for L0 unless ``center`` has it. Theta is left at the last of them.
    Used by FZOO (arXiv:2506.09034) and AGZO, for example.
    """
    base = center_loss(closure, theta) if center is None else center
    plus = [(direction, loss_along(closure, theta, direction, epsilon)) for direction in directions]
    return tuple(Estimate(direction, loss, None, (loss - base) / epsilon, base) for direction, loss in plus)
