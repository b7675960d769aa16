"""The basis of a tuner: for some weight matrices [m, n], a few orthonormal input-side columns V [n, r] by block name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.perturb.basis import Basis


def random_basis(blocks: Blocks, r: int | Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random orthonormal columns, uniform over subspaces: the control that a learned basis must beat.

    Args:
        r: columns per block: one number for every matrix that is no embedding (at most the matrix's width), or by the
            names of the blocks that get a basis, as :func:`ranks` gives them.
        seed: fixes the columns; the global random state is not touched.

    Raises:
        ValueError: a rank is below 1, or a block named is not there or no matrix of that width.
    """
    matrices = {block.name: block.tensor.shape[1] for block in blocks if block.tensor.ndim == 2}
    if isinstance(r, Mapping):
        wanted = dict(r)
    else:
        wanted = {b.name: min(r, matrices[b.name]) for b in blocks if b.name in matrices and not b.embedding}
    for name, rank in wanted.items():
        if not 1 <= rank <= matrices.get(name, 0):
            raise ValueError(f"no basis of rank {rank} for block {name!r}: the rank is 1 to the width of a matrix")
    generator = torch.Generator().manual_seed(seed)
    return {name: _columns(matrices[name], rank, generator) for name, rank in wanted.items()}


def _columns(n: int, rank: int, generator: torch.Generator) -> Tensor:
    # in float64, so that what is rounded to float32 is orthonormal to its last bits
    drawn = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float().contiguous()


def ranks(basis: Mapping[str, Tensor]) -> dict[str, int]:
    """Columns per block."""
    return {name: vectors.shape[1] for name, vectors in basis.items()}


def bind(basis: Mapping[str, Tensor], blocks: Blocks) -> Basis | None:
    """The basis of those of these blocks that have one, where walking wants it; None if none has."""
    found = {i: basis[b.name].to(b.tensor.device) for i, b in enumerate(blocks) if b.name in basis}
    return Basis(found) if found else None


def checked(basis: Mapping[str, Tensor], blocks: Blocks) -> dict[str, Tensor]:
    """A copy of the basis in float32, each block's in memory of its own.

    Args:
        blocks: all blocks of the model; they need no memory.

    Raises:
        ValueError: a block is unknown or no matrix, or columns are not finite and orthonormal.
    """
    index = {block.name: i for i, block in enumerate(blocks)}
    unknown = [name for name in basis if name not in index]
    if unknown:
        raise ValueError(
            f"the tuner's basis is for a block {unknown[0]!r} that the model does not have: give it one of this model "
            "(Tuner.with_basis)"
        )
    kept = {
        name: vectors.detach().float().clone(memory_format=torch.contiguous_format) for name, vectors in basis.items()
    }
    Basis({index[name]: vectors for name, vectors in kept.items()}).check(blocks)
    return kept
