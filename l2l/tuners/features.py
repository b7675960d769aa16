"""What a tuner's network sees of each block: named sets of features, computed alike in meta-training and in fine-tuning.

Features are functions of :class:`RunStatistics`, the record of a run that is carried from one step to the next. The set
``paper`` is that of ZO Fine-tuner (arXiv:2510.00419), raw. The set ``standard`` is relative and logarithmic, so that every
feature is of order one whatever the model and the task.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from l2l.params import Block, Blocks
from l2l.params.engine import block_moments

FEATURES = 5
"""Width of the set ``paper``."""
FLOOR = 1e-8
"""Added to variances: blocks that start constant, as biases and norms do, have a finite logarithm."""
LIMIT = 8.0
"""Largest absolute value of a standard feature."""
DECAY = 0.9
"""Weight of the old value in a running mean."""

KINDS = tuple(f"{prefix}{kind}" for prefix in ("", "attention ") for kind in ("embedding", "matrix", "vector"))
"""Every value of :func:`kind_of`."""
CONSTANT_COLUMNS = (*("log_start_variance", "embedding", "matrix", "vector", "attention", "depth"), *("log_size", "log_fan_in"))
RUN_COLUMNS = ("relative_loss", "step_fraction", "relative_gradient", "relative_curvature")
STANDARD_COLUMNS = ("relative_variance", "mean_over_spread", "last_sigma", *RUN_COLUMNS, *CONSTANT_COLUMNS[1:])

Running: TypeAlias = tuple[float, float]
"""The first value that was not 0, and the running mean since; zeros before."""


def kind_of(block: Block) -> str:
    """``embedding``, ``matrix`` (two dimensions or more) or ``vector``, preceded by ``attention`` for parts of attention."""
    kind = "embedding" if block.embedding else "matrix" if block.tensor.ndim > 1 else "vector"
    return f"attention {kind}" if block.attention else kind


def role(name: str) -> str:
    """The name of a block with its numbers masked, which the same tensor of all layers shares."""
    return re.sub(r"\d+", "#", name)


def depths(names: Sequence[str]) -> list[float]:
    """Relative depth of each block, 0 to 1.

    Layer i of k has depth (i + 1/2) / k, the layer being the first whole number among the dotted parts of the name. Blocks
    without a number have depth 0 before the first numbered block and 1 after it. Where no name has a number, depth is the
    relative position.
    """
    layers = [next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        return [i / max(len(names) - 1, 1) for i in range(len(names))]
    first, count = next(i for i, layer in enumerate(layers) if layer is not None), max(numbered) + 1
    return [float(i > first) if layer is None else (layer + 0.5) / count for i, layer in enumerate(layers)]


def block_constants(blocks: Blocks, moments: torch.Tensor) -> torch.Tensor:
    """[blocks, constants] float32: log(variance + FLOOR) at the start, then columns that depend on shape and structure.

    These are the kind as one-hot columns, 1 for parts of attention, :func:`depths`, log10(size) / 6, and log10(fan-in) / 3,
    fan-in being the coordinates per row, or 1 for a vector. ``moments``: [blocks, 2] mean and variance at the start.
    """
    found = torch.empty(len(blocks), len(CONSTANT_COLUMNS))
    found[:, 0] = torch.log(moments[:, 1] + FLOOR)
    rows: list[list[float]] = []
    for block, depth in zip(blocks, depths(blocks.names), strict=True):
        one_hot = [float(kind_of(block).endswith(name)) for name in ("embedding", "matrix", "vector")]
        fan_in = max(block.numel // max(block.tensor.shape[0], 1), 1) if block.tensor.ndim > 1 else 1
        sizes = [math.log10(max(block.numel, 1)) / 6, math.log10(fan_in) / 3]
        rows.append([*one_hot, float(block.attention), depth, *sizes])
    found[:, 1:] = torch.tensor(rows).reshape(len(blocks), len(CONSTANT_COLUMNS) - 1)
    return found


@dataclass(frozen=True)
class RunStatistics:
    """What a run records for its tuner after each step. Tensors and numbers only: it is saved with the run's state."""

    sigma: torch.Tensor
    """[blocks] float32: sigma of the last step, before normalisation; ones at the start."""
    moments: torch.Tensor
    """[blocks, 2] float64: mean and unbiased variance of each block's weights after the last step."""
    loss_plus: float = 0.0
    loss_minus: float = 0.0
    constants: torch.Tensor | None = None
    """[blocks, constants] float32 of :func:`block_constants`; None in runs saved before they existed."""
    step: int = 0
    """Steps taken."""
    horizon: int = 0
    """Planned number of steps; 0: unknown."""
    loss: Running = (0.0, 0.0)
    """Of (L+ + L-) / 2."""
    gradient: Running = (0.0, 0.0)
    """Of the absolute projected gradient."""
    curvature: Running = (0.0, 0.0)
    """Of the curvature along the direction, over the steps that measured it."""

    @staticmethod
    def start(blocks: Blocks, horizon: int = 0) -> "RunStatistics":
        """Before the first step: sigma 1, losses 0, moments of the current weights."""
        moments = torch.tensor(block_moments(blocks), dtype=torch.float64)
        constants = block_constants(blocks, moments)
        return RunStatistics(torch.ones(len(blocks)), moments, constants=constants, horizon=horizon)

    @property
    def centre(self) -> tuple[float, ...]:
        """Mean of each block after the last step: a shift that keeps sums of squares about it accurate."""
        return tuple(self.moments[:, 0].tolist())

    def at(self, blocks: Blocks) -> "RunStatistics":
        """The same record with the moments of the current weights, which something else has moved."""
        return replace(self, moments=torch.tensor(block_moments(blocks), dtype=torch.float64))

    def after(
        self,
        sigma: Sequence[float],
        moments: Sequence[Sequence[float]],
        losses: Sequence[tuple[float, float]],
        gradients: Sequence[float],
        curvature: float | None = None,
        horizon: int | None = None,
    ) -> "RunStatistics":
        """The record with one more step.

        Args:
            sigma: per block, before normalisation.
            moments: mean and variance per block after the step.
            losses: (L+, L-) of each direction; the last pair is kept, the mean of all joins the running mean.
            gradients: projected gradient of each direction.
            curvature: along the direction, where the step measured it.
            horizon: planned number of steps; None: unchanged.
        """
        mean_loss = sum(plus + minus for plus, minus in losses) / (2 * len(losses))
        mean_gradient = sum(abs(value) for value in gradients) / len(gradients)
        return RunStatistics(
            torch.tensor(sigma),
            torch.tensor(moments, dtype=torch.float64),
            *losses[-1],
            self.constants,
            self.step + 1,
            self.horizon if horizon is None else horizon,
            _running(self.loss, mean_loss),
            _running(self.gradient, mean_gradient),
            self.curvature if curvature is None else _running(self.curvature, curvature),
        )


def _running(running: Running, value: float) -> Running:
    first, mean = running
    return (value, value) if first == 0 else (first, DECAY * mean + (1 - DECAY) * value)


def log_ratio(running: Running) -> float:
    """log(mean / first), clipped to [-LIMIT, LIMIT]; 0 before the first value. NaN stays NaN."""
    first, mean = running
    return 0.0 if first == 0 else min(math.log(max(mean / first, math.exp(-LIMIT))), LIMIT)


def paper_features(statistics: RunStatistics) -> torch.Tensor:
    """[blocks, 5] float32: mean and variance of the weights, the last L+ and L-, the last sigma (arXiv:2510.00419)."""
    features = torch.empty(len(statistics.sigma), FEATURES)
    features[:, 0:2] = statistics.moments
    features[:, 2:4] = torch.tensor([statistics.loss_plus, statistics.loss_minus])
    features[:, 4] = statistics.sigma
    return features


def standard_features(statistics: RunStatistics) -> torch.Tensor:
    """[blocks, 14] float32, each column clipped to [-LIMIT, LIMIT].

    Per block: log of the weights' variance over that at the start of the run; their mean over the root of their mean
    square (the mean over the standard deviation, bounded); log of the last sigma. Per run, the same for all blocks: log of
    the running loss, absolute projected gradient and curvature, each over its first value, 0 until it is known; the
    fraction of the horizon that has been run, 0 where it is unknown. Then the columns of :func:`block_constants` but the
    first. Finite where weights and losses are; a NaN is not masked. ValueError where the record lacks the constants.
    """
    if statistics.constants is None:
        kept = "this run was saved by an earlier l2l that kept too little"
        raise ValueError(f"{kept} for the features 'standard': start it again")
    mean, variance = statistics.moments.unbind(1)
    spread = variance + FLOOR
    features = torch.empty(len(statistics.sigma), len(STANDARD_COLUMNS))
    features[:, 0] = torch.log(spread).float() - statistics.constants[:, 0]  # float32 both: exactly 0 at the start
    features[:, 1] = mean / torch.sqrt(mean * mean + spread)
    features[:, 2] = torch.log(statistics.sigma.clamp(min=math.exp(-LIMIT)))
    fraction = min(statistics.step / statistics.horizon, 1.0) if statistics.horizon else 0.0
    loss, gradient, curvature = map(log_ratio, (statistics.loss, statistics.gradient, statistics.curvature))
    features[:, 3:7] = torch.tensor([loss, fraction, gradient, curvature])
    features[:, 7:] = statistics.constants[:, 1:]
    return features.clamp_(-LIMIT, LIMIT)


@dataclass(frozen=True)
class FeatureSet:
    """Names of the columns, and the function that computes them."""

    columns: tuple[str, ...]
    compute: Callable[[RunStatistics], torch.Tensor]
    """[blocks, columns] float32, without a graph."""


FEATURE_SETS = {
    "paper": FeatureSet(("mean", "variance", "loss_plus", "loss_minus", "sigma"), paper_features),
    "standard": FeatureSet(STANDARD_COLUMNS, standard_features),
}
"""By the name in a tuner's config."""


def feature_set(name: str) -> FeatureSet:
    """The set of that name; ValueError where there is none."""
    if name not in FEATURE_SETS:
        raise ValueError(f"unknown tuner features {name!r}: l2l has {', '.join(FEATURE_SETS)}")
    return FEATURE_SETS[name]
