"""What a tuner network is: features per block in, one sigma per block out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class TunerNetwork(nn.Module, ABC):
    """A compact network over block features. A module ``l2l/tuners/x.py`` names its network class ``NETWORK``."""

    @abstractmethod
    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Sigma [blocks], not negative, from features [blocks, features].

        Args:
            rows: which of the network's blocks the features belong to; None: all, in order.
        """
