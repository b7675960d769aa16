"""What a zeroth-order step gains in expectation over its noise, to second order: what it costs to move is seen as well.

-lr * sum_k lambda_k G_k + (lr^2 / 2) * (sum_k lambda_k G'_k) * (sum_k lambda_k T_k), see :mod:`l2l.meta.closed_form`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from l2l.meta.closed_form import outcome_of, probe_step, second_order
from l2l.meta.curvature import Trace, check_trace, traces
from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.statistics import gradient_statistics


@final
@dataclass(frozen=True)
class ExpectedCurvature(Objective):
    """The cost of ``expected``, and that of the traces. Both terms come from noisy estimates, each unbiased; so is the
    product with ``hutchinson`` and ``fisher`` up to what batch A contributes to both factors."""

    trace: Trace = "fisher"
    """How traces are estimated: ``fisher``: a forward and backward pass per probe, ``hutchinson`` and ``seen``: two."""
    probes: int = 1
    """Estimates of the traces that are averaged."""
    keep: bool = True
    """As in ``expected``."""

    through_normaliser: bool = False
    """As in ``expected``."""

    def __post_init__(self) -> None:
        check_trace(self.trace, self.probes)

    def __call__(self, point: MetaState) -> MetaLoss:
        seen = probe_step(point)
        found = gradient_statistics(point, seen.components, self.keep)
        trace, passes = traces(point, seen.components, seen.direction, self.trace, self.probes)
        form = second_order(seen.energies, found.signal, found.noisy, trace, point.lr)
        return outcome_of(point, seen, form, found.loss, found.passes + passes, self.through_normaliser)
