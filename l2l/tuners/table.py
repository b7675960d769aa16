"""A learned scale per block that looks at nothing: what is left of a tuner without its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from l2l.tuners.features import FEATURES
from l2l.tuners.networks import TunerNetwork, check_start, first_scales


@final
class Table(TunerNetwork):
    """sigma = exp(a number per block): positive and smooth.

    Args:
        inputs: not looked at.
        start: ``mezo``: sigma is exactly 1. ``random``: drawn from a log-normal of mean 1.
        cv: coefficient of variation of that log-normal.
        values: sigma of each block, in order, to start from in place of ``start``; e.g. measured ones.
        basis_start: with two outputs, where sigma along the basis starts.
        basis_values: the same of each block, in its place.

    Raises:
        ValueError: values are not one positive number per block, or there are basis_values for one output.
    """

    def __init__(
        self,
        blocks: int,
        seed: int = 0,
        inputs: int = FEATURES,
        outputs: int = 1,
        start: Literal["random", "mezo"] = "mezo",
        cv: float = 0.75,
        values: Sequence[float] | None = None,
        basis_start: float = 0.3,
        basis_values: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_start(start)
        scales = first_scales(outputs, basis_start).repeat(blocks, 1)
        if start == "random":
            variance = torch.log(torch.tensor(1.0 + cv**2))
            normal = torch.randn(blocks, outputs, generator=torch.Generator().manual_seed(seed))
            scales *= torch.exp(normal * variance.sqrt() - variance / 2)
        if basis_values is not None and outputs == 1:
            raise ValueError("basis_values are given for one output: sigma along a basis is the second (outputs=2)")
        for column, given in enumerate((values, basis_values)):
            if given is not None:
                scales[:, column] = _checked(given, blocks)
        self.log_sigma = nn.Parameter(scales.log().squeeze(-1))

    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        return torch.exp(self.log_sigma if rows is None else self.log_sigma[torch.tensor(rows)])


def _checked(values: Sequence[float], blocks: int) -> Tensor:
    if len(values) != blocks:
        raise ValueError(f"the table has {len(values)} values for {blocks} blocks: give one per block, in their order")
    bad = next((value for value in values if not 0 < value < float("inf")), None)
    if bad is not None:
        raise ValueError(f"the table's values hold {bad}: each must be positive and finite")
    return torch.tensor(values, dtype=torch.float64)


NETWORK = Table
