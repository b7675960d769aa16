"""The loss after several zeroth-order steps, on a batch that none of them saw: less short-sighted than one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.trajectory import loss_after_steps
from l2l.methods.base import check_counts


@final
@dataclass(frozen=True)
class Unrolled(Objective):
    """Deployed steps on a batch each, then the loss of batch B. One backward pass at the end, whose gradients are
    multiplied with the regenerated noise of every step; what later steps see because of earlier ones is held constant.
    """

    steps: int = 8
    """Zeroth-order steps: 2 forward passes each. One is ``held_out``."""

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)

    def __call__(self, point: MetaState) -> MetaLoss:
        return loss_after_steps(point, [point.closure, *(point.further(i) for i in range(self.steps - 1))], point.other)
