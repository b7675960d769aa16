"""What a tuner sees of each block: named sets, the same in meta-training and in fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l.tuners.standard import STANDARD_COLUMNS, standard_features
from l2l.tuners.history import RunStatistics

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
