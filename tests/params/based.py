"""Directions with a basis, and what they are by their formula, built from the noise's specification alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from l2l.noise import Distribution, Key, standard_noise
from l2l.params import Basis, Blocks, Direction

EPSILON = 1e-3
RANK = 3


def basis_of(blocks: Blocks, rank: int = RANK, seed: int = 0) -> Basis:
    """Random orthonormal columns for every matrix."""
    draw = torch.Generator().manual_seed(seed)
    matrices = {i: block.tensor.shape[1] for i, block in enumerate(blocks) if block.tensor.ndim == 2}
    return Basis({i: torch.linalg.qr(torch.randn(n, min(rank, n), generator=draw))[0] for i, n in matrices.items()})


def based(
    blocks: Blocks,
    sigma: float = 0.5,
    factor: float = 1.0,
    key: Key | None = None,
    basis: Basis | None = None,
    distribution: Distribution = "gaussian",
    centre: tuple[float, ...] | None = None,
) -> Direction:
    """A direction of other scales in every block, along a basis in every matrix."""
    basis = basis_of(blocks) if basis is None else basis
    along = tuple(0.4 + 0.1 * i if i in basis.vectors else 0.0 for i in range(len(blocks)))
    dense = tuple(sigma * (1 + 0.1 * i) for i in range(len(blocks)))
    return Direction(key or Key(7, 3), dense, distribution, factor, centre, basis, along)


def formula(blocks: Blocks, u: Direction) -> dict[str, Tensor]:
    """u_b = factor * (sigma_b z_b + basis_sigma_b sqrt(n / r) R_b V_b^T), in float64."""
    found = {}
    for i, block in enumerate(blocks):
        shape, wide = block.tensor.shape, torch.float64
        value = u.sigma[i] * standard_noise(block.name, u.key, shape, u.distribution, wide)
        if u.basis is not None and i in u.basis.vectors:
            vectors = u.basis.vectors[i].to(wide)
            n, r = vectors.shape
            noise = standard_noise(f"{block.name}#basis", u.key, torch.Size((shape[0], r)), u.distribution, wide)
            value = value + u.basis_sigma[i] * math.sqrt(n / r) * noise @ vectors.t()
        found[block.name] = u.factor * value
    return found


def written(model: nn.Module) -> dict[str, Tensor]:
    """The weights as an evaluation reads them."""
    with torch.no_grad():
        return {name: torch.clone(parameter) for name, parameter in model.named_parameters()}
