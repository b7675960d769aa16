"""The standard features: relative, logarithmic, each of order one, whatever the model and the task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2l.tuners.constants import CONSTANT_COLUMNS, FLOOR
from l2l.tuners.history import RunStatistics, Running

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
    :func:`l2l.tuners.constants.block_constants`. Never NaN where weights and losses are finite; what is not is not masked.

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
