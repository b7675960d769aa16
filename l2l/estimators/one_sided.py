"""Differences against the loss at theta: a pass less per direction, and a bias of the order of epsilon."""

from __future__ import annotations

from collections.abc import Sequence

from l2l.estimators.base import Closure, Estimate, finite_loss
from l2l.noise import Key
from l2l.perturb import Direction, PerturbedParameters


def center_loss(closure: Closure, theta: PerturbedParameters) -> float:
    """The loss at theta. One forward pass.

    Half-precision weights are read as the copies that looks make, at distance 0: norms and biases then have the same
    float32 values as at either side, not rounded ones, which would lie between this loss and theirs.

    Raises:
        FloatingPointError: it is not finite.
    """
    if theta.update is None:
        theta.restore()
    else:
        theta.perturb(Direction(Key(0), (0.0,) * len(theta.blocks)), 0.0)
    return theta.evaluate(lambda: finite_loss(closure))


def loss_along(closure: Closure, theta: PerturbedParameters, direction: Direction, distance: float) -> float:
    """The loss at ``theta + distance * u``. One forward pass; theta is left there.

    Raises:
        FloatingPointError: it is not finite.
    """
    theta.perturb(direction, distance)
    return theta.evaluate(lambda: finite_loss(closure))


def one_sided(
    closure: Closure, theta: PerturbedParameters, directions: Sequence[Direction], epsilon: float, home: float | None = None
) -> tuple[Estimate, ...]:
    """g = (L+ - L0) / epsilon along each direction, with one loss at theta for all of them.

    One forward pass per direction, and one for L0 unless ``home`` has it. Theta is left at the last look.
    Used by FZOO (arXiv:2506.09034) and AGZO, for example.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    base = center_loss(closure, theta) if home is None else home
    plus = [loss_along(closure, theta, direction, epsilon) for direction in directions]
    return tuple(
        Estimate(direction, loss, None, (loss - base) / epsilon, base)
        for direction, loss in zip(directions, plus, strict=True)
    )
