"""Thin matrices of noise, from which shapes of low rank are made."""

from __future__ import annotations

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks
from l2l.noise import Distribution, Key, TensorSlice, NoiseTerm, standard_deviation, add_noise
from l2l.noise.pieces import computed_in
from l2l.perturb.basis import full_precision


def matrices(blocks: Blocks) -> frozenset[int]:
    """Indices of the blocks of two dimensions or more; of more, all but the first are taken as columns."""
    return frozenset(i for i, block in enumerate(blocks) if block.tensor.ndim >= 2 and block.numel)


def sides(block: Block) -> tuple[int, int]:
    """(rows, columns) of a block that is taken as a matrix."""
    rows = block.tensor.shape[0]
    return rows, block.numel // rows


def factor(
    block: Block, name: str, key: Key, shape: tuple[int, ...], distribution: Distribution = "gaussian"
) -> Tensor:
    """Standard noise of ``shape`` that belongs to a block, under a name of its own: on its device, at least float32."""
    out = torch.zeros(shape, dtype=computed_in(block.tensor.dtype), device=block.tensor.device)
    scale = 1 / standard_deviation(distribution)
    add_noise([TensorSlice(out.view(-1), f"{block.name}#{name}")], [NoiseTerm(key, [(scale,)], distribution)])
    return out


def plain(block: Block, key: Key, distribution: Distribution = "gaussian") -> Tensor:
    """The block's own standard noise, of its shape, on its device, at least float32: what it moves along without a shape."""
    out = torch.zeros(block.tensor.shape, dtype=computed_in(block.tensor.dtype), device=block.tensor.device)
    scale = 1 / standard_deviation(distribution)
    add_noise([TensorSlice(out.view(-1), block.name)], [NoiseTerm(key, [(scale,)], distribution)])
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` in the precision of its factors, whatever the process or an evaluation has chosen for speed.

    A transient copy is made inside an evaluation, and its update outside: only so are both along the same direction.
    """
    with torch.no_grad(), full_precision(left.device):
        return left @ right.t()


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns [n, r] that span those of ``matrix`` [n, r], r at most n."""
    with torch.no_grad():
        return torch.linalg.qr(matrix).Q


def spectral_rank(block: Block, rank: int, threshold: float) -> int:
    """How many singular values of a block lie above ``threshold`` times the largest: at least 1, at most ``rank``."""
    if not threshold:
        return rank
    matrix = block.tensor.detach().reshape(sides(block)).double()
    squares = torch.linalg.eigvalsh(matrix.t() @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.t())
    return min(rank, max(1, int((squares > threshold**2 * squares[-1]).sum())))
