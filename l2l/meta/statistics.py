"""A direction as a sum of independent components: the dense noise of every block, and the noise inside a basis of some.

Component k has the scale sigma_k, moves theta with covariance lambda_k * P_k, lambda_k = (factor * sigma_k)^2, and P_k is the
identity on the block for dense noise, (n / r) V V^T on its input side for noise inside a basis V [n, r]. Whatever an
objective needs of a component is an inner product under P_k: <a, b> of two gradients, or (n / r) <a V, b V>.

Inner products of gradients with the noise of a direction, as a backward pass hands the gradients over.

Squared norms of the gradient, per component of the direction: without noise from two batches, with it from one.

From derivatives in a tuner's outputs to a scalar that autograd can follow to its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.estimators.finite_difference import Closure
from l2l.meta.objectives.base import MetaState
from l2l.noise import MomentRequest, NoiseTerm, TensorSlice, add_noise, standard_deviation, standard_noise
from l2l.params import Direction
from l2l.params.basis import full_precision, low_rank_dot
from l2l.params.blocks import Blocks
from l2l.tuners.api import Tuner


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


@dataclass(frozen=True)
class Statistics:
    """What two independent batches say about the gradient at theta."""

    signal: Tensor
    """[components] float64: <gradient of A, gradient of B>, unbiased for the squared norm of the full gradient (G)."""
    noisy: Tensor
    """[components] float64: squared norm of one batch's gradient, the noise of the batch included (G'); mean of both."""
    loss: float
    """Of batch A at theta."""
    passes: int


def gradient_statistics(point: MetaState, components: Components, keep: bool = True) -> Statistics:
    """Gradients of batches A and B at theta. That of A goes to ``point.consume`` too.

    Args:
        keep: hold A's gradient while B's is taken: two backward passes, memory for one gradient of the model. False: a third
            backward pass, of the sum of both losses, and <a, b> = (|a + b|^2 - |a|^2 - |b|^2) / 2: no gradient is held,
            and where the batches are alike, or nearly orthogonal, figures are lost to cancellation.
    """
    own, others, both = components.zeros(), components.zeros(), components.zeros()
    kept: dict[int, Tensor] = {}

    def first(index: int, gradient: Tensor) -> None:
        components.add(own, index, gradient, gradient)
        if keep:
            kept[index] = gradient
        if point.consume is not None:
            point.consume(index, gradient)

    def second(index: int, gradient: Tensor) -> None:
        components.add(others, index, gradient, gradient)
        mine = kept.pop(index, None)
        if mine is not None:
            components.add(both, index, mine, gradient)

    loss = consume_gradients(point.closure, point.theta.blocks, first)
    consume_gradients(point.other, point.theta.blocks, second)
    if not keep:
        both = (
            squared_norms(point.theta.blocks, components, lambda: point.closure() + point.other()) - own - others
        ) / 2
    return Statistics(both, (own + others) / 2, loss, 6 if keep else 12)


def squared_norms(blocks: Blocks, components: Components, closure: Closure) -> Tensor:
    """[components] float64: squared norms of a loss's gradient. One forward and backward pass."""
    found = components.zeros()
    consume_gradients(closure, blocks, lambda index, gradient: components.add(found, index, gradient, gradient))
    return found


def differentiable(
    tuner: Tuner, features: Tensor, names: Sequence[str], sigma_gradient: Tensor, basis_gradient: Tensor | None = None
) -> Tensor:
    """sum_b sigma_b * gradient_b, with the same for basis_sigma: its gradient in the tuner's weights is the chain rule's.

    Args:
        features: [blocks, features] that the outputs are a function of.
        sigma_gradient: [blocks] derivative in sigma before normalisation.
        basis_gradient: [blocks] derivative in basis_sigma; None where there is no basis.
    """
    scales = tuner.scales(features, names)
    if scales.ndim == 1:
        return torch.sum(scales * sigma_gradient)
    inside = torch.zeros_like(sigma_gradient) if basis_gradient is None else basis_gradient
    return torch.sum(scales * torch.stack([sigma_gradient, inside], 1))


def reaching(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(found).sum(0) if found else None
