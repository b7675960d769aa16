"""Inner products of gradients with the noise of a direction, as a backward pass hands the gradients over."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import MomentRequest, TensorSlice, NoiseTerm, standard_deviation, add_noise
from l2l.perturb import Direction
from l2l.perturb.basis import low_rank_dot

WAITING = 32
"""One in so many coordinates of the model may wait in gradients for a common traversal: few calls, little memory."""


@final
class NoiseDots:
    """Inner products of the blocks' gradients with the noise of a direction, which is made anew.

    ``values``: <z_b, gradient_b>. ``basis_values``: <sqrt(n / r) R_b V_b^T, gradient_b> where the direction moves along
    a basis.
    """

    def __init__(self, blocks: Blocks, direction: Direction) -> None:
        self._names = blocks.names
        self._most = blocks.numel // WAITING
        self._direction = direction
        self._found = np.zeros(len(blocks))
        self._along_basis = torch.zeros(len(blocks), dtype=torch.float64)
        self._waiting: dict[int, Tensor] = {}

    def take(self, index: int, gradient: Tensor) -> None:
        """Note a block's gradient. It is held until enough have come, or until :meth:`values` is asked for."""
        basis = self._direction.basis
        if basis is not None and index in basis.vectors:
            where = self._names[index], basis.vectors[index], self._direction.key
            self._along_basis[index] += low_rank_dot(*where, gradient, self._direction.distribution)
        self._waiting[index] = gradient
        if sum(waiting.numel() for waiting in self._waiting.values()) > self._most:
            self._traverse()

    def values(self) -> Tensor:
        """[blocks] float64; zero where no gradient came."""
        self._traverse()
        return torch.from_numpy(self._found)

    def basis_values(self) -> Tensor | None:
        """[blocks] float64; zero where no gradient came or the block has no basis. None where there is no basis."""
        return None if self._direction.basis is None else self._along_basis

    def _traverse(self) -> None:
        pieces = [TensorSlice(gradient.reshape(-1), self._names[i]) for i, gradient in self._waiting.items()]
        kind, nowhere = self._direction.distribution, [0.0] * len(pieces)
        term = NoiseTerm(self._direction.key, [(0.0,)] * len(pieces), kind)
        sums = add_noise(pieces, [term], MomentRequest(nowhere, nowhere), store=False)
        assert sums is not None, "sums were asked for"
        self._found[list(self._waiting)] = sums.du / standard_deviation(kind)
        self._waiting.clear()
