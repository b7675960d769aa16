"""How the model moves while its tuner learns, and zeroth-order steps that are taken and undone.

The model follows first-order SGD with momentum, as in ZO Fine-tuner (arXiv:2510.00419), or the zeroth-order steps of
fine-tuning, and is put back to its initial weights now and then. SGD differs from the paper in holding one buffer only: the
backward pass adds each gradient to the velocity as it completes, so the norm of the velocity is clipped, at
clip / (1 - momentum), which gradients clipped at ``clip`` would add up to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from l2l.estimators import Closure, consume_gradients
from l2l.meta.state import MetaState
from l2l.methods.base import Method, descend
from l2l.noise import Key
from l2l.optim import CurvatureLR, CurvatureLRState, StepReport, zo_step
from l2l.params import Blocks, PerturbedParameters

_STRIDE = 2**40
"""Distance between the key steps of successive inner steps: more than there are outer steps, so no key is used twice."""


def zero_velocity(blocks: Blocks) -> dict[int, torch.Tensor]:
    """A velocity of zeros in the shape of each block, by index."""
    return {i: torch.zeros_like(block.tensor.detach()) for i, block in enumerate(blocks)}


def momentum_step(
    closure: Closure,
    theta: PerturbedParameters,
    velocity: dict[int, torch.Tensor],
    lr: float,
    momentum: float = 0.8,
    clip: float = 1.0,
) -> float:
    """velocity <- momentum * velocity + gradient; theta <- theta - lr * clipped velocity. Returns the loss.
    FloatingPointError where it is not finite; theta has not moved then."""
    loss = consume_gradients(closure, theta.blocks, accumulate_velocity(velocity, momentum))
    apply_velocity(theta, velocity, lr, momentum, clip)
    return loss


def accumulate_velocity(velocity: dict[int, torch.Tensor], momentum: float) -> Callable[[int, torch.Tensor], None]:
    """A function of (block index, gradient): velocity <- momentum * velocity + gradient."""

    def take(index: int, gradient: torch.Tensor) -> None:
        torch.add(gradient, velocity[index], alpha=momentum, out=velocity[index])

    return take


def apply_velocity(
    theta: PerturbedParameters, velocity: dict[int, torch.Tensor], lr: float, momentum: float, clip: float
) -> None:
    """theta <- theta - lr * velocity, its norm limited to clip / (1 - momentum)."""
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in velocity.values()])))
    theta.add_dense(velocity, -lr * min(1.0, clip / (1 - momentum) / norm) if norm > 0 else 0.0)


@dataclass(frozen=True)
class InnerStep:
    """One zeroth-order step as fine-tuning takes it, and the method's state before and after it."""

    before: Any
    after: Any
    report: StepReport

    @property
    def amounts(self) -> tuple[float, ...]:
        """Per direction, how far theta moved against it: lr * projected gradient / directions."""
        estimates = self.report.estimates
        return tuple(self.report.lr[0] * e.projected_gradient / len(estimates) for e in estimates)


def inner_steps(
    theta: PerturbedParameters,
    method: Method[Any],
    state: Any,
    batches: Iterable[tuple[Closure, Key]],
    lr: float,
    curvature_lr: CurvatureLR | None = None,
) -> Iterator[InnerStep]:
    """Take one zeroth-order step per batch and key. ``lr`` is the step fraction where ``curvature_lr`` is given.
    FloatingPointError where a loss is not finite; theta is back where that step began."""
    rates, seen = [lr] * len(theta.blocks), CurvatureLRState()
    for closure, key in batches:
        after, report = zo_step(closure, theta, method, state, key, rates, curvature_lr=curvature_lr, curvature_lr_state=seen)
        yield InnerStep(state, after, report)
        theta.raise_deferred_interrupt()
        state, seen = after, report.curvature_lr_state


@contextmanager
def trial_steps(point: MetaState, batches: Sequence[Closure]) -> Iterator[list[InnerStep]]:
    """Zeroth-order steps from the state, one per batch. They are undone at exit, whatever is raised."""
    steps: list[InnerStep] = []
    try:
        for step in steps_from(point, batches):
            steps.append(step)
        yield steps
    finally:
        undo_steps(point.theta, steps)


def steps_from(point: MetaState, batches: Sequence[Closure]) -> Iterator[InnerStep]:
    """Take zeroth-order steps from the state, one per batch."""
    history = point.history.at(point.theta.blocks)  # the trajectory has moved the weights since
    keyed = [(closure, inner_key(point.key, number)) for number, closure in enumerate(batches)]
    yield from inner_steps(point.theta, point.method, history, keyed, point.lr)


@contextmanager
def put_back(theta: PerturbedParameters) -> Iterator[None]:
    """Afterwards theta has the very bits that it had before, from a copy; undone steps leave roundings."""
    theta.restore()
    kept = {block.name: block.tensor.detach().clone() for block in theta.blocks}
    try:
        yield
    finally:
        theta.assign(kept)


def inner_key(key: Key, number: int) -> Key:
    """The key of the ``number``-th inner step of an outer step; the first has the outer step's own."""
    return replace(key, step=key.step + number * _STRIDE)


def undo_steps(theta: PerturbedParameters, steps: Sequence[InnerStep]) -> None:
    """Move theta back along the directions of these steps, the last first, in one traversal of the parameters."""
    with theta.step():
        for step in reversed(steps):
            for estimate, amount in zip(step.report.estimates, step.amounts, strict=True):
                theta.add(estimate.direction, [amount] * len(theta.blocks))


def replay(theta: PerturbedParameters, report: StepReport, lr: float) -> None:
    """Take a step again from its report, without a forward pass."""
    with theta.step():
        descend(theta, report.estimates, [lr] * len(theta.blocks))
