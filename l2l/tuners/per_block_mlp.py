"""One small network per block, 5 -> 64 -> tanh -> 1, all evaluated in one batched computation.

ZO Fine-tuner, arXiv:2510.00419. sigma is the absolute value of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from l2l.tuners.base import TunerNetwork
from l2l.tuners.features import FEATURES


@final
class PerBlockMLP(TunerNetwork):
    """[blocks] independent networks of 449 parameters (at 64 hidden units), stored as stacked tensors.

    Args:
        start: ``random``, as in the paper: torch's initialisation of both layers, sigma scattered over the blocks.
            ``mezo``: a second layer of weight 0 and bias 1, so that sigma is 1 until something is learned.
    """

    def __init__(
        self, blocks: int, hidden: int = 64, seed: int = 0, start: Literal["random", "mezo"] = "random"
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:
            # torch's default initialisation of a linear layer
            return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) / fan_in**0.5)

        self.first_weight = uniform(FEATURES, blocks, hidden, FEATURES)
        self.first_bias = uniform(FEATURES, blocks, hidden)
        self.second_weight = uniform(hidden, blocks, hidden)
        self.second_bias = uniform(hidden, blocks)
        if start == "mezo":
            nn.init.zeros_(self.second_weight)
            nn.init.ones_(self.second_bias)
        elif start != "random":
            raise ValueError(f"start={start!r} must be 'random' or 'mezo'")

    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        w1, b1, w2, b2 = self.first_weight, self.first_bias, self.second_weight, self.second_bias
        if rows is not None and list(rows) != list(range(len(b2))):
            index = torch.tensor(rows)
            w1, b1, w2, b2 = w1[index], b1[index], w2[index], b2[index]
        hidden = torch.tanh((w1 * features[:, None, :]).sum(-1) + b1)
        return ((w2 * hidden).sum(-1) + b2).abs()


NETWORK = PerBlockMLP
