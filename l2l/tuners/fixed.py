"""A fixed sigma per block, whatever the features: the control that a learned tuner must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from l2l.tuners.features import FEATURES
from l2l.tuners.networks import TunerNetwork, first_scales


@final
class FixedSigma(TunerNetwork):
    """sigma_b drawn once from a log-normal of mean 1 and the given coefficient of variation.

    The published tuners' sigma varies by .75 over the blocks, as that of freshly initialised networks does.

    Args:
        inputs: not looked at.
        basis_start: with two outputs, mean of the sigma along the basis.
    """

    def __init__(
        self,
        blocks: int,
        seed: int = 0,
        cv: float = 0.75,
        inputs: int = FEATURES,
        outputs: int = 1,
        basis_start: float = 0.3,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        variance = torch.log(torch.tensor(1.0 + cv**2))
        normal = torch.randn(blocks, outputs, generator=generator)
        sigma = torch.exp(normal * variance.sqrt() - variance / 2) * first_scales(outputs, basis_start)
        self.sigma = nn.Parameter(sigma.squeeze(-1))

    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        return (self.sigma if rows is None else self.sigma[torch.tensor(rows)]).abs()


NETWORK = FixedSigma
