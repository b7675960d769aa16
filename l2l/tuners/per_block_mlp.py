"""One small network per block, 5 -> 64 -> tanh -> 1, all evaluated in one batched computation.

ZO Fine-tuner, arXiv:2510.00419. sigma is the absolute value of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from l2l.tuners.features import FEATURES
from l2l.tuners.networks import TunerNetwork, check_start, first_scales, uniform


@final
class PerBlockMLP(TunerNetwork):
    """[blocks] independent networks of 449 parameters (at 64 hidden units), stored as stacked tensors.

    Args:
        start: ``random``, as in the paper: torch's initialisation of both layers, sigma scattered over the blocks.
            ``mezo``: a second layer of weight 0 and bias 1, so that sigma is 1 until something is learned.
        basis_start: with ``mezo`` and two outputs, the bias of the second.
    """

    def __init__(
        self,
        blocks: int,
        hidden: int = 64,
        seed: int = 0,
        start: Literal["random", "mezo"] = "random",
        inputs: int = FEATURES,
        outputs: int = 1,
        basis_start: float = 0.3,
    ) -> None:
        super().__init__()
        first = first_scales(outputs, basis_start)
        check_start(start)
        generator = torch.Generator().manual_seed(seed)
        ends = (blocks,) if outputs == 1 else (blocks, outputs)
        self.first_weight = uniform(generator, inputs, blocks, hidden, inputs)
        self.first_bias = uniform(generator, inputs, blocks, hidden)
        self.second_weight = uniform(generator, hidden, *ends, hidden)
        self.second_bias = uniform(generator, hidden, *ends)
        if start == "mezo":
            nn.init.zeros_(self.second_weight)
            with torch.no_grad():
                self.second_bias.copy_(first.expand(blocks, outputs).reshape(ends))

    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        w1, b1, w2, b2 = self.first_weight, self.first_bias, self.second_weight, self.second_bias
        if rows is not None and list(rows) != list(range(len(b2))):
            index = torch.tensor(rows)
            w1, b1, w2, b2 = w1[index], b1[index], w2[index], b2[index]
        hidden = torch.tanh((w1 * features[:, None, :]).sum(-1) + b1)
        if w2.ndim == 3:
            hidden = hidden[:, None, :]
        return ((w2 * hidden).sum(-1) + b2).abs()


NETWORK = PerBlockMLP
