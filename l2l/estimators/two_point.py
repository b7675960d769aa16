"""The central difference along one direction (SPSA): exact on quadratics, for every epsilon."""

from __future__ import annotations

from l2l.estimators.base import Closure, Estimate, finite_loss
from l2l.perturb import Direction, PerturbedParameters


def two_point(closure: Closure, theta: PerturbedParameters, direction: Direction, epsilon: float) -> Estimate:
    """Look at ``theta + epsilon * u`` and ``theta - epsilon * u``: g = (L+ - L-) / (2 epsilon) estimates <grad L, u>.

    Two forward passes. Theta is left at ``-epsilon * u``, so that a step along the same direction costs no extra
    traversal; :meth:`Theta.home` or the end of the step brings it back.
    Spall 1992 (SPSA); Malladi et al. 2023, arXiv:2305.17333, Definition 1.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    theta.perturb(direction, epsilon)
    plus = theta.evaluate(lambda: finite_loss(closure))
    theta.perturb(direction, -epsilon)
    minus = theta.evaluate(lambda: finite_loss(closure))
    return Estimate(direction, plus, minus, (plus - minus) / (2 * epsilon))


def third_point(closure: Closure, theta: PerturbedParameters, direction: Direction) -> float:
    """The loss between the two that :func:`two_point` sees along ``direction``. One forward pass.

    Taken before them it costs a traversal less than after. Half-precision weights are read as the copies that looks
    make, at distance 0: norms and biases then have the same float32 values as at both sides, not rounded ones.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    if theta.update is None:
        theta.restore()
    else:
        theta.perturb(direction, 0.0)
    return theta.evaluate(lambda: finite_loss(closure))
