"""The loss after one zeroth-order step, on another batch than the step's: memorising the batch's noise earns nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.trajectory import loss_after_steps


@final
@dataclass(frozen=True)
class HeldOut(Objective):
    """The published objective (arXiv:2510.00419) with its loss on batch B. Costs the same."""

    def __call__(self, point: MetaState) -> MetaLoss:
        return loss_after_steps(point, [point.closure], point.other)
