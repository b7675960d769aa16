"""Where the model goes while its tuner learns, restarted now and then: early and late states come again and again.

By first-order SGD with momentum, as in ZO Fine-tuner, arXiv:2510.00419, or by the deployed zeroth-order steps. The first
differs from the paper in holding one buffer only: gradients go straight into the velocity as the backward pass completes
them, and it is the velocity whose norm is limited (by clip / (1 - momentum), what gradients clipped at ``clip`` would add
up to).

Deployed zeroth-order steps that are taken back, and what a loss behind them says about each step's sigma.

ZO Fine-tuner, arXiv:2510.00419, for one step on the same batch. With c = (L+ - L-) / (2 epsilon), step k moves theta by
-lr * c_k * factor_k * sigma_kb * z_kb, and the loss behind all steps has, with every c, factor, z held constant,
d L / d sigma_kb = -lr * c_k * factor_k * <z_kb, grad_b L>. So no graph over the parameters and no copy of the model is
needed: the steps are taken in place, one backward pass hands over each block's gradient as it completes, its inner
products with the regenerated noise of every step are taken, it is freed, and the steps are taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.estimators.finite_difference import Closure
from l2l.meta.objectives.base import MetaLoss, MetaState
from l2l.meta.statistics import NoiseDots, differentiable, reaching
from l2l.methods.base import check_counts, check_positive, descend
from l2l.noise import Key
from l2l.optim import StepReport, zo_step
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tuners.features import RunStatistics

_KINDS = 2
"""Word that sets the stream of a mixture's draws apart from those of batches and tasks."""


@dataclass(frozen=True)
class TrajectoryConfig:
    """How the model moves."""

    lr: float = 1e-2
    """Inner learning rate at the start of each period; it falls linearly to zero until the restart."""
    momentum: float = 0.8
    """Share of the velocity that is kept."""
    clip: float = 1.0
    """Limit on the gradient norm, applied to the velocity as clip / (1 - momentum)."""
    restart_every: int = 200
    """Outer steps until the model is put back to its initial weights."""
    kind: Literal["teacher", "zo", "mixture"] = "teacher"
    """By first-order steps, by the deployed zeroth-order steps, or by one of them from restart to restart."""
    zo_share: float = 0.5
    """Share of a mixture's periods that are zeroth-order."""

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, clip=self.clip)
        if self.kind not in ("teacher", "zo", "mixture"):
            raise ValueError(f"trajectory={self.kind!r} must be 'teacher', 'zo' or 'mixture'")
        if not 0 <= self.zo_share <= 1:
            raise ValueError(f"zo_share={self.zo_share} must lie between 0 and 1")
        check_counts(restart_every=self.restart_every)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of outer step ``step``: linear from lr to 0 within each period."""
        return self.lr * (1 - (step % self.restart_every) / self.restart_every)

    def zeroth_order(self, step: int, seed: int) -> bool:
        """Whether the model moves by the deployed step at outer step ``step``: the same throughout a period."""
        if self.kind != "mixture":
            return self.kind == "zo"
        return np.random.default_rng((seed, step // self.restart_every, _KINDS)).random() < self.zo_share


def at_rest(blocks: Blocks) -> dict[int, Tensor]:
    """Velocity zero, per block."""
    return {i: torch.zeros_like(block.tensor.detach()) for i, block in enumerate(blocks)}


def momentum_step(
    closure: Closure, theta: PerturbedParameters, velocity: dict[int, Tensor], lr: float, config: TrajectoryConfig
) -> float:
    """velocity <- momentum * velocity + gradient; theta <- theta - lr * limited velocity. Gives the loss.

    Raises:
        FloatingPointError: the loss is not finite; theta has not moved.
    """
    loss = consume_gradients(closure, theta.blocks, accelerate(velocity, config))
    move(theta, velocity, lr, config)
    return loss


def accelerate(velocity: dict[int, Tensor], config: TrajectoryConfig) -> Callable[[int, Tensor], None]:
    """What takes each gradient into the velocity: velocity <- momentum * velocity + gradient."""

    def take(index: int, gradient: Tensor) -> None:
        torch.add(gradient, velocity[index], alpha=config.momentum, out=velocity[index])

    return take


def move(theta: PerturbedParameters, velocity: dict[int, Tensor], lr: float, config: TrajectoryConfig) -> None:
    """theta <- theta - lr * limited velocity."""
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in velocity.values()])))
    limit = config.clip / (1 - config.momentum)
    theta.add_dense(velocity, -lr * min(1.0, limit / norm) if norm > 0 else 0.0)


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
