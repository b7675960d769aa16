"""What a block is, in numbers that stay as they are throughout a run. Read off shapes and structure.

What a run remembers for its tuner from one step to the next.

The standard features: relative, logarithmic, each of order one, whatever the model and the task.

What a tuner sees of each block: named sets, the same in meta-training and in fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from l2l.params.blocks import Block, Blocks
from l2l.params.engine import block_moments

FLOOR = 1e-8
"""Added to variances: blocks that start constant, as biases and norms do, have a finite logarithm."""

CONSTANT_COLUMNS = (
    "log_start_variance",
    "embedding",
    "matrix",
    "vector",
    "attention",
    "depth",
    "log_size",
    "log_fan_in",
)
NUM_CONSTANTS = len(CONSTANT_COLUMNS)

KINDS = tuple(f"{prefix}{kind}" for prefix in ("", "attention ") for kind in ("embedding", "matrix", "vector"))
"""What :func:`kind_of` says."""


def kind_of(block: Block) -> str:
    """``embedding``, ``matrix`` (two dimensions or more) or ``vector``; ``attention`` before it where it belongs to one."""
    kind = "embedding" if block.embedding else "matrix" if block.tensor.ndim > 1 else "vector"
    return f"attention {kind}" if block.attention else kind


def block_constants(blocks: Blocks, moments: Tensor) -> Tensor:
    """[blocks, CONSTANTS] float32: log(variance + FLOOR) of the moments [blocks, 2], then what never changes.

    The kind as one-hot columns, 1 where the block belongs to attention, :func:`depths`, log10(size) / 6, and
    log10(fan-in) / 3, fan-in being the coordinates per row, or 1 for a vector.
    """
    found = torch.empty(len(blocks), NUM_CONSTANTS)
    found[:, 0] = torch.log(moments[:, 1] + FLOOR)
    rows = [_constants(block, depth) for block, depth in zip(blocks, depths(blocks.names), strict=True)]
    found[:, 1:] = torch.tensor(rows).reshape(len(blocks), NUM_CONSTANTS - 1)
    return found


def _constants(block: Block, depth: float) -> list[float]:
    kind = kind_of(block)
    one_hot = [float(kind.endswith(name)) for name in ("embedding", "matrix", "vector")]
    size, fan_in = max(block.numel, 1), 1
    if block.tensor.ndim > 1:
        fan_in = max(block.numel // max(block.tensor.shape[0], 1), 1)
    return [*one_hot, float(block.attention), depth, math.log10(size) / 6, math.log10(fan_in) / 3]


def depths(names: Sequence[str]) -> list[float]:
    """How deep each block lies, 0 to 1.

    By the first whole number among the dotted parts of its name, as lists of layers give it: layer i of k lies at
    (i + 1/2) / k; blocks without a number lie at 0 before the first numbered one and at 1 behind it. Where no name has a
    number, by position.
    """
    layers = [next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        return [i / max(len(names) - 1, 1) for i in range(len(names))]
    first, count = next(i for i, layer in enumerate(layers) if layer is not None), max(numbered) + 1
    return [float(i > first) if layer is None else (layer + 0.5) / count for i, layer in enumerate(layers)]


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
        return RunStatistics(
            torch.ones(len(blocks)), moments, constants=block_constants(blocks, moments), horizon=horizon
        )

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


LIMIT = 8.0
"""No feature is larger than this in absolute value."""

PER_BLOCK = ("relative_variance", "mean_over_spread", "last_sigma")
PER_RUN = ("relative_loss", "step_fraction", "relative_gradient", "relative_curvature")
STANDARD_COLUMNS = (*PER_BLOCK, *PER_RUN, *CONSTANT_COLUMNS[1:])


def standard_features(history: RunStatistics) -> Tensor:
    """Features [blocks, 14] float32.

    Per block: log of the weights' variance over that at the start of the run; their mean over the root of their mean
    square (the mean over the standard deviation, bounded); log of the last sigma. Per run, the same for all blocks:
    log of the running loss, absolute projected gradient and curvature, each over its first value, 0 until it is known;
    the share of the run's steps that lie behind, 0 where the horizon is unknown. And the constants of
    :func:`l2l.tuners.features.block_constants`. Never NaN where weights and losses are finite; what is not is not masked.

    Raises:
        ValueError: the history was saved without the constants.
    """
    if history.constants is None:
        raise ValueError(
            "this run was saved by an earlier l2l that kept too little for the features 'standard': start it again"
        )
    mean, variance = history.moments.unbind(1)
    spread = variance + FLOOR
    features = torch.empty(len(history.sigma), len(STANDARD_COLUMNS))
    features[:, 0] = torch.log(spread).float() - history.constants[:, 0]  # float32 both: exactly 0 at the start
    features[:, 1] = mean / torch.sqrt(mean * mean + spread)
    features[:, 2] = torch.log(history.sigma.clamp(min=math.exp(-LIMIT)))
    features[:, 3:7] = torch.tensor(_of_the_run(history))
    features[:, 7:] = history.constants[:, 1:]
    return features.clamp_(-LIMIT, LIMIT)


def _of_the_run(history: RunStatistics) -> list[float]:
    fraction = min(history.step / history.horizon, 1.0) if history.horizon else 0.0
    return [log_ratio(history.loss), fraction, log_ratio(history.gradient), log_ratio(history.curvature)]


def log_ratio(running: Running) -> float:
    """log(mean / first) between -LIMIT and LIMIT; 0 before the first value. NaN stays NaN."""
    first, mean = running
    if first == 0:
        return 0.0
    return min(math.log(max(mean / first, math.exp(-LIMIT))), LIMIT)


__all__ = ["FEATURES", "FEATURE_SETS", "FeatureSet", "RunStatistics", "block_features", "feature_set"]

FEATURES = 5
"""Mean and variance of the block's weights, the last L+ and L-, the block's last sigma (arXiv:2510.00419)."""


@dataclass(frozen=True)
class FeatureSet:
    """A way of describing blocks to a tuner."""

    columns: tuple[str, ...]
    compute: Callable[[RunStatistics], Tensor]
    """[blocks, columns] float32 of a history; no graph."""


def block_features(history: RunStatistics) -> Tensor:
    """Features [blocks, 5] float32, raw as in the paper."""
    features = torch.empty(len(history.sigma), FEATURES)
    features[:, 0:2] = history.moments
    features[:, 2] = history.loss_plus
    features[:, 3] = history.loss_minus
    features[:, 4] = history.sigma
    return features


FEATURE_SETS = {
    "paper": FeatureSet(("mean", "variance", "loss_plus", "loss_minus", "sigma"), block_features),
    "standard": FeatureSet(STANDARD_COLUMNS, standard_features),
}
"""By the name that a tuner's config holds."""


def feature_set(name: str) -> FeatureSet:
    """The set of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FEATURE_SETS:
        raise ValueError(f"unknown tuner features {name!r}: l2l has {', '.join(FEATURE_SETS)}")
    return FEATURE_SETS[name]
