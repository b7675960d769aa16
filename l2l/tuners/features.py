"""What a tuner sees of each block: the one definition that meta-training and fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.perturb.moments import block_moments

FEATURES = 5
"""Mean and variance of the block's weights, the last L+ and L-, the block's last sigma (arXiv:2510.00419)."""


@dataclass(frozen=True)
class History:
    """What a run remembers for its tuner from one step to the next."""

    sigma: Tensor
    """[blocks] float32: sigma of the last step, before normalisation; ones at the start."""
    moments: Tensor
    """[blocks, 2] float64: mean and unbiased variance of each block's weights after the last step."""
    loss_plus: float = 0.0
    loss_minus: float = 0.0

    @staticmethod
    def start(blocks: Blocks) -> History:
        """Before the first step: sigma one, losses zero, the weights as they stand."""
        return History(torch.ones(len(blocks)), torch.tensor(block_moments(blocks), dtype=torch.float64))

    @property
    def centre(self) -> tuple[float, ...]:
        """A number near each block's mean."""
        return tuple(self.moments[:, 0].tolist())

    def at(self, blocks: Blocks) -> History:
        """The same history with the blocks' weights as they stand: where something else has moved them."""
        return replace(self, moments=torch.tensor(block_moments(blocks), dtype=torch.float64))


def block_features(history: History) -> Tensor:
    """Features [blocks, 5] float32, raw as in the paper."""
    features = torch.empty(len(history.sigma), FEATURES)
    features[:, 0:2] = history.moments
    features[:, 2] = history.loss_plus
    features[:, 3] = history.loss_minus
    features[:, 4] = history.sigma
    return features
