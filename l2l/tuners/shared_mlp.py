"""One network for all blocks: what it learns of one block serves the others, and, without embeddings, other models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from l2l.tuners.features import FEATURES
from l2l.tuners.networks import TunerNetwork, check_start, first_scales, uniform


@final
class SharedMLP(TunerNetwork):
    """features (and the block's embedding) -> hidden -> tanh -> outputs; sigma = exp(output): positive and smooth.

    Args:
        hidden: units between.
        embedding: learned numbers of each block's own that it sees beside the features. 0: it has nothing that belongs
            to a block, and serves models of any size and family.
        start: ``mezo``: a second layer of weight 0, so that sigma is exactly 1 until something is learned. ``random``:
            torch's initialisation of both layers, sigma scattered about 1.
        basis_start: with two outputs, where sigma along the basis starts.
    """

    def __init__(
        self,
        blocks: int,
        seed: int = 0,
        inputs: int = FEATURES,
        outputs: int = 1,
        hidden: int = 32,
        embedding: int = 0,
        start: Literal["random", "mezo"] = "mezo",
        basis_start: float = 0.3,
    ) -> None:
        super().__init__()
        first = first_scales(outputs, basis_start)
        check_start(start)
        generator = torch.Generator().manual_seed(seed)
        seen = inputs + embedding
        self.first_weight = uniform(generator, seen, hidden, seen)
        self.first_bias = uniform(generator, seen, hidden)
        self.second_weight = uniform(generator, hidden, outputs, hidden)
        self.second_bias = uniform(generator, hidden, outputs)
        self.shared = frozenset(name for name, _ in self.named_parameters())
        self.embedding = nn.Parameter(torch.randn(blocks, embedding, generator=generator)) if embedding else None
        with torch.no_grad():
            if start == "mezo":
                self.second_weight.zero_()
                self.second_bias.zero_()
            self.second_bias += first.log()

    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        if self.embedding is not None:
            own = self.embedding if rows is None else self.embedding[torch.tensor(rows)]
            features = torch.cat([features, own], 1)
        hidden = torch.tanh(features @ self.first_weight.t() + self.first_bias)
        return torch.exp(hidden @ self.second_weight.t() + self.second_bias).squeeze(-1)


NETWORK = SharedMLP
