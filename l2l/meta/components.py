"""A direction as a sum of independent components: the dense noise of every block, and the noise inside a basis of some.

Component k has the scale sigma_k, moves theta with covariance lambda_k * P_k, lambda_k = (factor * sigma_k)^2, and P_k is the
identity on the block for dense noise, (n / r) V V^T on its input side for noise inside a basis V [n, r]. Whatever an
objective needs of a component is an inner product under P_k: <a, b> of two gradients, or (n / r) <a V, b V>.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import standard_noise
from l2l.perturb import Direction
from l2l.perturb.basis import full_precision


@final
class Components:
    """Components of directions over these blocks: first every block's dense noise, then that inside bases, by block.

    Args:
        bases: V_b [n, r] by block index; a block that is missing, or None, has dense noise only.
    """

    def __init__(self, blocks: Blocks, bases: Mapping[int, Tensor | None] | None = None) -> None:
        self.blocks = blocks
        self.bases = {i: basis for i, basis in sorted((bases or {}).items()) if basis is not None}
        self._position = {i: len(blocks) + k for k, i in enumerate(self.bases)}

    @staticmethod
    def of(blocks: Blocks, direction: Direction) -> Components:
        """Those of a direction."""
        return Components(blocks, None if direction.basis is None else direction.basis.vectors)

    def __len__(self) -> int:
        return len(self.blocks) + len(self.bases)

    def zeros(self) -> Tensor:
        """[components] float64."""
        return torch.zeros(len(self), dtype=torch.float64)

    def scales(self, direction: Direction) -> Tensor:
        """sigma_k [components] float64 of a direction, before the factor."""
        return torch.tensor([*direction.sigma, *(direction.basis_sigma[i] for i in self.bases)], dtype=torch.float64)

    def places(self, direction: Direction) -> list[tuple[int, ...]]:
        """Where each component's sigma stands in what the tuner gives for this direction, [blocks] or [blocks, 2]."""
        if direction.basis is None:
            return [(i,) for i in range(len(self.blocks))]
        return [*((i, 0) for i in range(len(self.blocks))), *((i, 1) for i in self.bases)]

    def blocks_scales(self, direction: Direction) -> Tensor:
        """[components] float64: sigma of each component's block, whichever component it is."""
        return torch.tensor([*direction.sigma, *(direction.sigma[i] for i in self.bases)], dtype=torch.float64)

    def products(self, index: int, a: Tensor, b: Tensor) -> Iterator[tuple[int, float]]:
        """(component, inner product of two tensors of the block's shape under it), for the components of a block."""
        yield index, torch.dot(a.reshape(-1), b.reshape(-1)).item()
        basis = self.bases.get(index)
        if basis is not None:
            n, r = basis.shape
            with torch.no_grad(), full_precision(a.device):
                left = a @ basis.to(a.dtype)
                right = left if b is a else b @ basis.to(b.dtype)
            yield self._position[index], n / r * torch.sum(left * right).item()

    def add(self, into: Tensor, index: int, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        """Add the scaled inner products of a block to ``into`` [components]."""
        for component, value in self.products(index, a, b):
            into[component] += scale * value

    def inside(self, into: Tensor, index: int, direction: Direction, gradient: Tensor, scale: float) -> None:
        """Add, for a block with a basis, that component's inner product of the direction's dense noise z_b with a gradient."""
        if index in self.bases:
            name, kind = self.blocks[index].name, direction.distribution
            z = standard_noise(name, direction.key, gradient.shape, kind, gradient.dtype, gradient.device)
            into[self._position[index]] += scale * dict(self.products(index, z, gradient))[self._position[index]]

    def split(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """A derivative in sigma_k [components] as one in sigma [blocks] and one in basis_sigma [blocks], float32."""
        count = len(self.blocks)
        if not self.bases:
            return gradient.float(), None
        along = torch.zeros(count, dtype=torch.float64)
        along[list(self.bases)] = gradient[count:]
        return gradient[:count].float(), along.float()


def spent(total: float, least: float) -> float:
    """A sum that a logarithm or a division follows: not below ``least``."""
    if math.isnan(total):
        raise FloatingPointError("a statistic of the gradient is nan: lower epsilon, or look for overflowing inputs")
    return max(total, least)
