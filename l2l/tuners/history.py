"""What a run remembers for its tuner from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.perturb.moments import block_moments
from l2l.tuners.constants import block_constants

KEPT = 0.9
"""Share of a running mean that the next value leaves."""

Running: TypeAlias = tuple[float, float]
"""The first value that was not 0, and the running mean since; zeros before."""


@dataclass(frozen=True)
class RunStatistics:
    """Tensors and numbers only: it is saved with the state of a run as it stands."""

    sigma: Tensor
    """[blocks] float32: sigma of the last step, before normalisation; ones at the start."""
    moments: Tensor
    """[blocks, 2] float64: mean and unbiased variance of each block's weights after the last step."""
    loss_plus: float = 0.0
    loss_minus: float = 0.0
    constants: Tensor | None = None
    """[blocks, CONSTANTS] float32, see :func:`block_constants`; None in runs that were saved without them."""
    step: int = 0
    """Steps taken."""
    horizon: int = 0
    """Steps that the run is to take; 0: unknown."""
    loss: Running = (0.0, 0.0)
    """Of (L+ + L-) / 2."""
    gradient: Running = (0.0, 0.0)
    """Of the absolute projected gradient."""
    curvature: Running = (0.0, 0.0)
    """Of the curvature along the direction, over the steps that measured it."""

    @staticmethod
    def start(blocks: Blocks, horizon: int = 0) -> RunStatistics:
        """Before the first step: sigma one, losses zero, the weights as they stand."""
        moments = torch.tensor(block_moments(blocks), dtype=torch.float64)
        return RunStatistics(torch.ones(len(blocks)), moments, constants=block_constants(blocks, moments), horizon=horizon)

    @property
    def centre(self) -> tuple[float, ...]:
        """A number near each block's mean."""
        return tuple(self.moments[:, 0].tolist())

    def at(self, blocks: Blocks) -> RunStatistics:
        """The same history with the blocks' weights as they stand: where something else has moved them."""
        return replace(self, moments=torch.tensor(block_moments(blocks), dtype=torch.float64))

    def after(
        self,
        sigma: Sequence[float],
        moments: Sequence[Sequence[float]],
        losses: Sequence[tuple[float, float]],
        gradients: Sequence[float],
        curvature: float | None = None,
        horizon: int | None = None,
    ) -> RunStatistics:
        """The history with one more step.

        Args:
            sigma: per block, before normalisation.
            moments: mean and variance per block, behind the step.
            losses: (L+, L-) of each draw; the last pair is kept, the mean of all joins the running mean.
            gradients: projected gradient of each draw.
            curvature: along the direction, where the step measured it.
            horizon: steps that the run is to take; None: as it was.
        """
        mean_loss = sum(plus + minus for plus, minus in losses) / (2 * len(losses))
        steepness = sum(abs(value) for value in gradients) / len(gradients)
        return RunStatistics(
            torch.tensor(sigma),
            torch.tensor(moments, dtype=torch.float64),
            *losses[-1],
            self.constants,
            self.step + 1,
            self.horizon if horizon is None else horizon,
            followed(self.loss, mean_loss),
            followed(self.gradient, steepness),
            self.curvature if curvature is None else followed(self.curvature, curvature),
        )


def followed(running: Running, value: float) -> Running:
    """The running mean with one more value."""
    first, mean = running
    return (value, value) if first == 0 else (first, KEPT * mean + (1 - KEPT) * value)
