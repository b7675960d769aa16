"""What a tuner network is: features per block in, one sigma per block out, or two where the tuner has a basis.

From the name of an architecture to its network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


class TunerNetwork(nn.Module, ABC):
    """A compact network over block features. A module ``l2l/tuners/x.py`` names its network class ``NETWORK``.

    It is built from JSON values: ``blocks``, how many there are; ``seed``, of its initialisation; ``inputs``, features
    per block; ``outputs``, 1 or 2; and arguments of its own.
    """

    shared: frozenset[str] = frozenset()
    """Parameters that serve all blocks. Each of the others has one row per block, in order."""

    @abstractmethod
    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Sigma [blocks], not negative, from features [blocks, features].

        With two outputs [blocks, 2]: sigma of the dense noise, and of the noise inside the block's basis.

        Args:
            rows: which of the network's blocks the features belong to; None: all, in order.
        """


def uniform(generator: torch.Generator, fan_in: int, *shape: int) -> nn.Parameter:
    """A parameter as torch initialises linear layers: uniform within 1 / sqrt(fan-in)."""
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) / fan_in**0.5)


def first_scales(outputs: int, basis_start: float) -> Tensor:
    """[outputs] what every block starts from: sigma 1, and ``basis_start`` along its basis.

    Raises:
        ValueError: ``outputs`` is neither 1 nor 2, or ``basis_start`` is not positive.
    """
    if outputs not in (1, 2):
        raise ValueError(f"outputs={outputs} must be 1 (sigma) or 2 (sigma and that of the basis)")
    if not 0 < basis_start < float("inf"):
        raise ValueError(f"basis_start={basis_start} must be positive and finite")
    return torch.tensor([1.0, basis_start][:outputs])


def check_start(start: str) -> None:
    """Raise ValueError unless it is one of the two starts there are."""
    if start not in ("random", "mezo"):
        raise ValueError(f"start={start!r} must be 'random' or 'mezo'")


def build_network(architecture: str, args: dict[str, Any]) -> TunerNetwork:
    """The network of a module of ``l2l.tuners``. Only names inside this package are ever imported.

    Raises:
        ValueError: no such architecture.
    """
    if not architecture.isidentifier():
        raise ValueError(f"tuner architecture {architecture!r} is not a module name of l2l.tuners")
    try:
        network = import_module(f"l2l.tuners.{architecture}").NETWORK
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"unknown tuner architecture {architecture!r}: l2l.tuners has no such network") from error
    return network(**args)
