"""The loss after one or several zeroth-order steps, differentiated in every step's sigma (ZO Fine-tuner, arXiv:2510.00419).

With c = (L+ - L-) / (2 epsilon), step k moves theta by -lr * c_k * factor_k * sigma_kb * z_kb. With every c, factor and z held
constant, the loss after all steps has d L / d sigma_kb = -lr * c_k * factor_k * <z_kb, grad_b L>. So neither a graph over the
parameters nor a copy of the model is needed: the steps are taken in place, one backward pass hands over each block's gradient
as it completes, its inner products with the regenerated noise of every step are taken, it is freed, and the steps are undone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from l2l.estimators import Closure, consume_gradients
from l2l.meta.state import MetaLoss, MetaState, Objective
from l2l.meta.statistics import NoiseDots, surrogate_of
from l2l.meta.trajectory import trial_steps
from l2l.methods.base import check_counts


@final
@dataclass(frozen=True)
class OneStepLoss(Objective):
    """The loss after one step, on the step's own batch: the published objective. Two forward passes, one forward and backward
    pass. The projected gradient is held constant, as in the paper: in expectation that halves the slope of ``expected``."""

    def __call__(self, point: MetaState) -> MetaLoss:
        return loss_after_steps(point, [point.closure], point.closure)


@final
@dataclass(frozen=True)
class HeldOutLoss(Objective):
    """The same on batch B, so that fitting the noise of the step's batch earns nothing. The same cost."""

    def __call__(self, point: MetaState) -> MetaLoss:
        return loss_after_steps(point, [point.closure], point.other)


@final
@dataclass(frozen=True)
class UnrolledLoss(Objective):
    """The loss of batch B after several steps, each on a batch of its own: less short-sighted than one step. One backward pass
    at the end; what later steps measure because of earlier ones is held constant."""

    steps: int = 8
    """Zeroth-order steps: 2 forward passes each. One is ``held_out_loss``."""

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)

    def __call__(self, point: MetaState) -> MetaLoss:
        return loss_after_steps(point, [point.closure, *(point.further(i) for i in range(self.steps - 1))], point.other)


def loss_after_steps(point: MetaState, batches: Sequence[Closure], judge: Closure) -> MetaLoss:
    """The loss ``judge`` after one step on each of these batches, differentiated in every step's sigma."""
    blocks, tuner = point.theta.blocks, point.method.tuner
    with trial_steps(point, batches) as steps:
        dots = [[NoiseDots(blocks, e.direction) for e in step.report.estimates] for step in steps]

        def take(index: int, gradient: torch.Tensor) -> None:
            for one in (dot for of_step in dots for dot in of_step):
                one.take(index, gradient)
            if point.consume is not None:
                point.consume(index, gradient)

        loss = consume_gradients(judge, blocks, take)
    slopes, parts = [], []
    for step, found in zip(steps, dots, strict=True):
        scales = [-c * e.direction.factor for e, c in zip(step.report.estimates, step.amounts, strict=True)]
        dense = [(scale * dot.values()).float() for scale, dot in zip(scales, found, strict=True)]
        inside = [(scale, dot.basis_values()) for scale, dot in zip(scales, found, strict=True)]
        slopes.append(
            (torch.stack(dense).sum(0), _sum([None if dot is None else (scale * dot).float() for scale, dot in inside]))
        )
        parts.append(surrogate_of(tuner, tuner.features(step.before), blocks.names, *slopes[-1]))
    return MetaLoss(
        surrogate=torch.stack(parts).sum(),
        value=loss,
        loss=loss,
        history=steps[0].after,
        report=steps[0].report,
        passes=sum(step.report.passes for step in steps) + 3,
        sigma_gradient=torch.stack([slope[0] for slope in slopes]).sum(0),
        basis_gradient=_sum([slope[1] for slope in slopes]),
    )


def _sum(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of those that are there; None where none is."""
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(found).sum(0) if found else None
