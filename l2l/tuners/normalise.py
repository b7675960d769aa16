"""The normaliser: whatever the overall size of sigma, the perturbation spends the energy that MeZO's would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks


@final
@dataclass(frozen=True)
class EnergyNormaliser:
    """factor = sqrt(sum_b N_b) / sqrt(sum_b N_b sigma_b^2), N_b the coordinates of block b that count.

    ZO Fine-tuner, arXiv:2510.00419. All coordinates of a block count, save that of an embedding only
    ``embedding_rows_per_sample * batch_size`` rows do: the others take no part in a batch. The factor is a constant of
    the step: no gradient flows through it, as in the paper.
    """

    embedding_rows_per_sample: float = 15.0
    """Distinct rows of an embedding that one sample is expected to touch."""
    batch_size: int = 16
    """Samples per batch that the tuner was trained for. Kept in fine-tuning: sigma does not depend on its batch."""
    enabled: bool = True
    """False: factor 1, sigma as it comes."""

    def counts(self, blocks: Blocks) -> Tensor:
        """N_b [blocks] float64."""
        return torch.tensor([self._count(*_rows(block)) for block in blocks], dtype=torch.float64)

    def factor(self, sigma: Tensor, counts: Tensor) -> float:
        """The common factor of sigma [blocks].

        Raises:
            ValueError: every sigma is zero, or one is not finite.
        """
        if not self.enabled:
            return 1.0
        energy = torch.sum(counts * sigma.detach().double() ** 2).item()
        if not 0 < energy < float("inf"):
            raise ValueError(f"sigma has energy {energy}: it must be finite and not zero everywhere; check the tuner")
        return (torch.sum(counts).item() / energy) ** 0.5

    def _count(self, rows: float, width: float, embedding: bool) -> float:
        return min(rows, self.embedding_rows_per_sample * self.batch_size) * width if embedding else rows * width


def _rows(block: Block) -> tuple[float, float, bool]:
    rows = block.tensor.shape[0] if block.embedding else block.numel
    return rows, block.numel / max(rows, 1), block.embedding
