"""Gradient statistics per component of a direction, and their chain rule to the tuner's weights.

A direction is a sum of independent components: the dense noise of every block, and the noise inside a basis of some. Component
k has the scale sigma_k and covariance lambda_k * P_k, lambda_k = (factor * sigma_k)^2, where P_k is the identity on the block
for dense noise, and (n / r) V V^T on the block's input side for noise inside a basis V [n, r]. What an objective needs of a
component is an inner product under P_k: <a, b> of two gradients, or (n / r) <a V, b V>.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from l2l.estimators import Closure, consume_gradients, loss_of
from l2l.meta.state import MetaState
from l2l.noise import MomentRequest, NoiseTerm, TensorSlice, add_noise, standard_deviation
from l2l.params import Blocks, Direction
from l2l.params.direction import full_precision, low_rank_dot
from l2l.tuners.api import Tuner


@final
class Components:
    """Components of directions over these blocks: first every block's dense noise, then that inside bases, by block.

    Args:
        bases: V_b [n, r] by block index; a block that is missing, or None, has dense noise only.
    """

    def __init__(self, blocks: Blocks, bases: Mapping[int, torch.Tensor | None] | None = None) -> None:
        self.blocks = blocks
        self.bases = {i: basis for i, basis in sorted((bases or {}).items()) if basis is not None}
        self.inside = {i: len(blocks) + k for k, i in enumerate(self.bases)}
        """Index of the component inside a block's basis, by block."""
        self.parts = [*((i, 0) for i in range(len(blocks))), *((i, 1) for i in self.bases)]
        """(block, 0 for its dense noise or 1 for that inside its basis) of each component."""

    def zeros(self) -> torch.Tensor:
        """[components] float64 of zeros."""
        return torch.zeros(len(self.parts), dtype=torch.float64)

    def scales(self, direction: Direction) -> torch.Tensor:
        """sigma_k [components] float64 of a direction, before the factor."""
        sigma = direction.sigma, direction.basis_sigma
        return torch.tensor([sigma[kind][i] for i, kind in self.parts], dtype=torch.float64)

    def basis_product(self, index: int, a: torch.Tensor, b: torch.Tensor) -> float:
        """(n / r) <a V, b V> of two tensors [m, n] of a block with a basis V [n, r]."""
        n, r = self.bases[index].shape
        with torch.no_grad(), full_precision(a.device):
            left = a @ self.bases[index].to(a.dtype)
            right = left if b is a else b @ self.bases[index].to(b.dtype)
        return n / r * torch.sum(left * right).item()

    def add(self, into: torch.Tensor, index: int, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
        """Add the scaled inner products of two tensors of a block, under each of its components, to ``into``."""
        into[index] += scale * torch.dot(a.reshape(-1), b.reshape(-1)).item()
        if index in self.bases:
            into[self.inside[index]] += scale * self.basis_product(index, a, b)

    def split(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A derivative in sigma_k [components] as one in sigma [blocks] and one in basis_sigma [blocks], float32."""
        if not self.bases:
            return gradient.float(), None
        count = len(self.blocks)
        inside = torch.zeros(count, dtype=torch.float64)
        inside[list(self.bases)] = gradient[count:]
        return gradient[:count].float(), inside.float()


WAITING = 32
"""Gradients of at most 1 / 32 of the model's coordinates wait for a common traversal: few calls, little memory."""


@final
class NoiseDots:
    """Inner products <z_b, gradient_b> of the blocks' gradients with the regenerated noise of a direction."""

    def __init__(self, blocks: Blocks, direction: Direction) -> None:
        self._names, self._most = blocks.names, blocks.numel // WAITING
        self._direction = direction
        self._found = np.zeros(len(blocks))
        self._inside = torch.zeros(len(blocks), dtype=torch.float64)
        self._waiting: dict[int, torch.Tensor] = {}

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """Add a block's gradient. It is held until enough have come, or until :meth:`values` is called."""
        basis = self._direction.basis
        if basis is not None and index in basis.vectors:
            noise = self._names[index], basis.vectors[index], self._direction.key
            self._inside[index] += low_rank_dot(*noise, gradient, self._direction.distribution)
        self._waiting[index] = gradient
        if sum(waiting.numel() for waiting in self._waiting.values()) > self._most:
            self._regenerate()

    def values(self) -> torch.Tensor:
        """[blocks] float64; zero where no gradient came."""
        self._regenerate()
        return torch.from_numpy(self._found)

    def basis_values(self) -> torch.Tensor | None:
        """<sqrt(n / r) R_b V_b^T, gradient_b> [blocks] float64, 0 for blocks without a basis; None where there is none."""
        return None if self._direction.basis is None else self._inside

    def _regenerate(self) -> None:
        slices = [TensorSlice(gradient.reshape(-1), self._names[i]) for i, gradient in self._waiting.items()]
        kind, zeros = self._direction.distribution, [0.0] * len(slices)
        term = NoiseTerm(self._direction.key, [(0.0,)] * len(slices), kind)
        sums = add_noise(slices, [term], MomentRequest(zeros, zeros), store=False)
        assert sums is not None, "sums were asked for"
        self._found[list(self._waiting)] = sums.du / standard_deviation(kind)
        self._waiting.clear()


@dataclass(frozen=True)
class GradientStatistics:
    """From two independent batches at theta, [components] float64: ``signal`` <gradient of A, gradient of B>, unbiased for the
    squared norm of the full gradient (G); ``noisy``, the mean squared norm of one batch's gradient, its sampling noise
    included (G'). Also the loss of batch A, and the forward passes spent."""

    signal: torch.Tensor
    noisy: torch.Tensor
    loss: float
    passes: int


def gradient_statistics(point: MetaState, components: Components, keep: bool = True) -> GradientStatistics:
    """Statistics from gradients of batches A and B at theta. That of A goes to ``point.consume`` too.

    Args:
        keep: hold A's gradient while B's is taken: two backward passes, memory for one gradient of the model. False: a third
            backward pass, of the sum of both losses, and <a, b> = (|a + b|^2 - |a|^2 - |b|^2) / 2: no gradient is held,
            and digits are lost to cancellation where the gradients are alike or nearly orthogonal.
    """
    first, second, both = components.zeros(), components.zeros(), components.zeros()
    kept: dict[int, torch.Tensor] = {}

    def take_first(index: int, gradient: torch.Tensor) -> None:
        components.add(first, index, gradient, gradient)
        if keep:
            kept[index] = gradient
        if point.consume is not None:
            point.consume(index, gradient)

    def take_second(index: int, gradient: torch.Tensor) -> None:
        components.add(second, index, gradient, gradient)
        if index in kept:
            components.add(both, index, kept.pop(index), gradient)

    blocks = point.theta.blocks
    loss = consume_gradients(point.closure, blocks, take_first)
    consume_gradients(point.other, blocks, take_second)
    if not keep:
        summed = squared_norms(blocks, components, lambda: loss_of(point.closure()) + loss_of(point.other()))
        both = (summed - first - second) / 2
    return GradientStatistics(both, (first + second) / 2, loss, 6 if keep else 12)


def squared_norms(blocks: Blocks, components: Components, closure: Closure) -> torch.Tensor:
    """[components] float64: squared norms of a loss's gradient. One forward and backward pass."""
    found = components.zeros()
    consume_gradients(closure, blocks, lambda index, gradient: components.add(found, index, gradient, gradient))
    return found


def surrogate_of(
    tuner: Tuner,
    features: torch.Tensor,
    names: Sequence[str],
    sigma_gradient: torch.Tensor,
    basis_gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_b sigma_b * gradient_b, and the same of basis_sigma: a scalar whose gradient in the tuner's weights follows from
    the derivatives [blocks] in sigma and basis_sigma by the chain rule. ``features``: [blocks, features]."""
    scales = tuner.scales(features, names)
    if scales.ndim == 1:
        return torch.sum(scales * sigma_gradient)
    inside = torch.zeros_like(sigma_gradient) if basis_gradient is None else basis_gradient
    return torch.sum(scales * torch.stack([sigma_gradient, inside], 1))
