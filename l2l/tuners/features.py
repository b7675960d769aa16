"""What a tuner sees of each block: the one definition that meta-training and fine-tuning share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks

FEATURES = 5
"""Mean and variance of the block's weights, the last L+ and L-, the block's last sigma (arXiv:2510.00419)."""

PIECE = 2**18
"""Elements per piece when moments are taken."""


@dataclass(frozen=True)
class History:
    """What a run remembers for its tuner from one step to the next."""

    sigma: Tensor
    """[blocks] float32: sigma of the last step, before normalisation; ones at the start."""
    loss_plus: float = 0.0
    loss_minus: float = 0.0

    @staticmethod
    def start(blocks: Blocks) -> History:
        """Before the first step: sigma one, losses zero."""
        return History(torch.ones(len(blocks)))


def moments(block: Block) -> tuple[float, float]:
    """Mean and unbiased variance of a block's weights; the variance of a single number is 0.

    Two passes in pieces: torch.var_mean is a hundred times slower on CPU, and one whole difference would cost memory.
    """
    mean = block.flat.mean()
    squares = sum((part - mean).square_().sum().item() for part in block.flat.split(PIECE))
    return mean.item(), squares / max(block.numel - 1, 1)


def block_features(blocks: Blocks, history: History) -> Tensor:
    """Features [blocks, 5] float32, raw as in the paper, at theta as it stands."""
    return assemble([moments(block) for block in blocks], history)


def assemble(statistics: Sequence[tuple[float, float]], history: History) -> Tensor:
    """Features [blocks, 5] from (mean, variance) per block and the history."""
    features = torch.empty(len(statistics), FEATURES)
    features[:, 0:2] = torch.tensor(statistics)
    features[:, 2] = history.loss_plus
    features[:, 3] = history.loss_minus
    features[:, 4] = history.sigma
    return features
