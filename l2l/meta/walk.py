"""Deployed zeroth-order steps that are taken back, and what a loss behind them says about each step's sigma.

ZO Fine-tuner, arXiv:2510.00419, for one step on the same batch. With c = (L+ - L-) / (2 epsilon), step k moves theta by
-lr * c_k * factor_k * sigma_kb * z_kb, and the loss behind all steps has, with every c, factor, z held constant,
d L / d sigma_kb = -lr * c_k * factor_k * <z_kb, grad_b L>. So no graph over the parameters and no copy of the model is
needed: the steps are taken in place, one backward pass hands over each block's gradient as it completes, its inner
products with the regenerated noise of every step are taken, it is freed, and the steps are taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure
from l2l.finetune.step import StepReport, zo_step
from l2l.meta.noise_dots import NoiseDots
from l2l.meta.objectives.base import MetaLoss, MetaState
from l2l.meta.outputs import differentiable, reaching
from l2l.methods.base import descend
from l2l.noise import Key
from l2l.perturb import PerturbedParameters
from l2l.tuners.features import RunStatistics

FAR = 2**40
"""Distance in the key's step between the inner steps of a walk: no outer step is ever counted that far."""


@dataclass(frozen=True)
class Step:
    """One deployed step."""

    features: Tensor
    """[blocks, features] that the tuner saw before it."""
    following: RunStatistics
    """What the run remembers after it."""
    report: StepReport
    amounts: tuple[float, ...]
    """For each direction looked along, how far theta has moved against it: lr * projected gradient / directions."""


def inner_key(key: Key, number: int) -> Key:
    """The key of the ``number``-th inner step of an outer step; the first has the outer step's own."""
    return replace(key, step=key.step + number * FAR)


def take_step(point: MetaState, closure: Closure, history: RunStatistics, key: Key) -> Step:
    """Take the deployed step: theta has moved."""
    features = point.method.tuner.features(history)
    following, report = zo_step(closure, point.theta, point.method, history, key, [point.lr] * len(point.theta.blocks))
    amounts = tuple(point.lr * e.projected_gradient / len(report.estimates) for e in report.estimates)
    return Step(features, following, report, amounts)


@contextmanager
def walked(point: MetaState, batches: Sequence[Closure]) -> Iterator[list[Step]]:
    """The deployed steps from the point, one per batch. On the way out theta is back, whatever is raised."""
    history, steps = point.history.at(point.theta.blocks), []  # the trajectory has moved them since
    try:
        for number, closure in enumerate(batches):
            steps.append(take_step(point, closure, history, inner_key(point.key, number)))
            history = steps[-1].following
            point.theta.raise_deferred_interrupt()
        yield steps
    finally:
        take_back(point.theta, steps)


def take_back(theta: PerturbedParameters, steps: Sequence[Step]) -> None:
    """Move theta back along what these steps have seen, the last first. One traversal."""
    with theta.step():
        for step in reversed(steps):
            for estimate, amount in zip(step.report.estimates, step.amounts, strict=True):
                theta.add(estimate.direction, [amount] * len(theta.blocks))


def replay(theta: PerturbedParameters, report: StepReport, lr: float) -> None:
    """Take a deployed step again by what it saw: no forward pass."""
    with theta.step():
        descend(theta, report.estimates, [lr] * len(theta.blocks))


def loss_after_steps(point: MetaState, batches: Sequence[Closure], judge: Closure) -> MetaLoss:
    """The loss ``judge`` behind the deployed steps on these batches, differentiated in every step's sigma."""
    blocks = point.theta.blocks
    with walked(point, batches) as steps:
        dots = [[NoiseDots(blocks, e.direction) for e in step.report.estimates] for step in steps]

        def take(index: int, gradient: Tensor) -> None:
            for one in (dot for of_step in dots for dot in of_step):
                one.take(index, gradient)
            if point.consume is not None:
                point.consume(index, gradient)

        loss = consume_gradients(judge, blocks, take)
    slopes = [_slopes(step, found) for step, found in zip(steps, dots, strict=True)]
    names = blocks.names
    parts = [
        differentiable(point.method.tuner, step.features, names, *slope)
        for step, slope in zip(steps, slopes, strict=True)
    ]
    return MetaLoss(
        surrogate=torch.stack(parts).sum(),
        value=loss,
        loss=loss,
        features=steps[0].features,
        history=steps[0].following,
        report=steps[0].report,
        passes=sum(step.report.passes for step in steps) + 3,
        sigma_gradient=torch.stack([slope[0] for slope in slopes]).sum(0),
        basis_gradient=reaching([slope[1] for slope in slopes]),
    )


def _slopes(step: Step, dots: Sequence[NoiseDots]) -> tuple[Tensor, Tensor | None]:
    """Derivatives of the loss behind in one step's sigma and basis_sigma, [blocks] float32."""
    seen = list(zip(step.report.estimates, step.amounts, dots, strict=True))
    dense = [(-amount * e.direction.factor * dot.values()).float() for e, amount, dot in seen]
    inside = [(-amount * e.direction.factor, dot.basis_values()) for e, amount, dot in seen]
    along = [(scale * values).float() for scale, values in inside if values is not None]
    return torch.stack(dense).sum(0), reaching(along)
