"""Where the model goes while its tuner learns, restarted now and then: early and late states come again and again.

By first-order SGD with momentum, as in ZO Fine-tuner, arXiv:2510.00419, or by the deployed zeroth-order steps. The first
differs from the paper in holding one buffer only: gradients go straight into the velocity as the backward pass completes
them, and it is the velocity whose norm is limited (by clip / (1 - momentum), what gradients clipped at ``clip`` would add
up to).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure
from l2l.methods.base import check_counts, check_positive
from l2l.perturb import PerturbedParameters

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
