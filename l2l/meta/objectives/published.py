"""The loss after one zeroth-order step, on the same batch: what ZO Fine-tuner (arXiv:2510.00419) trains for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.trajectory import loss_after_steps


@final
@dataclass(frozen=True)
class OneStepLoss(Objective):
    """Two forward passes, one forward and backward pass. The projected gradient is held constant, as in the paper: in
    expectation that is half of the slope of :mod:`l2l.meta.objectives.expected`."""

    def __call__(self, point: MetaState) -> MetaLoss:
        return loss_after_steps(point, [point.closure], point.closure)
