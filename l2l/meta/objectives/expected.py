"""What a zeroth-order step gains in expectation over its noise, to first order: no noise of the direction is left in it.

-lr * sum_k lambda_k <gA_k, gB_k>, lambda_k = (factor * sigma_k)^2, with gradients of two different batches: their inner product
is unbiased for the squared norm of the full gradient, which one batch's own norm is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from l2l.meta.closed_form import first_order, outcome_of, probe_step
from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.statistics import gradient_statistics


@final
@dataclass(frozen=True)
class Expected(Objective):
    """Two forward passes, and two forward and backward passes at theta. Holds one gradient of the model."""

    keep: bool = True
    """Hold a gradient while the other is taken. False: none is held, for one more pass over both batches."""

    through_normaliser: bool = False
    """Whether the slope takes into account that a larger sigma makes the common factor smaller. False: it is a constant,
    as in the paper, so that every larger sigma seems good, also where the normaliser undoes it."""

    def __call__(self, point: MetaState) -> MetaLoss:
        seen = probe_step(point)
        found = gradient_statistics(point, seen.components, self.keep)
        form = first_order(seen.energies, found.signal, point.lr)
        return outcome_of(point, seen, form, found.loss, found.passes, self.through_normaliser)
