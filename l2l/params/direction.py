"""Search directions and moves along them: recipes, never tensors.

A direction is keyed noise with one scale per block. A basis adds a low-rank term: a block [m, n] with input-side columns
V [n, r] is perturbed along sqrt(n / r) * R V^T beside its dense noise, R [m, r] being standard noise of the same key under a
name of its own. The factor makes the mean square of a coordinate 1, as that of dense noise is: E||R V^T||^2 = m * r where the
columns of V are orthonormal. An operator (a mask, a low rank, a guide, a metric) replaces the noise of the blocks it covers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from l2l.noise import Distribution, Key, NoiseTerm, noise_dot, standard_deviation, standard_noise
from l2l.params.blocks import Block, Blocks

ORTHONORMAL = 1e-4
"""How far V^T V may be from the identity, in any entry."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns V_b [n, r] for some blocks. Two are equal only where they are the same object.

    The vectors are not copied: they must not change as long as a perturbation or a pending move uses them. They are
    checked at the first use; see :meth:`check`.
    """

    vectors: Mapping[int, torch.Tensor]
    """By index of the block; best float32, on the block's device."""

    def check(self, blocks: Blocks) -> None:
        """Raise ValueError, naming the block, where a basis is none for these blocks."""
        for index, vectors in self.vectors.items():
            if not 0 <= index < len(blocks):
                raise ValueError(f"a basis is given for block {index}, but there are {len(blocks)} blocks")
            problem = _problem(blocks[index], vectors)
            if problem is not None:
                raise ValueError(f"basis of block {blocks[index].name!r} {problem}")

    def spread(self, index: int) -> float:
        """sqrt(n / r) of a block; 0 where it has no basis."""
        vectors = self.vectors.get(index)
        return 0.0 if vectors is None else math.sqrt(vectors.shape[0] / vectors.shape[1])


def _problem(block: Block, vectors: torch.Tensor) -> str | None:
    if block.tensor.ndim != 2:
        return f"has no place: the block has shape {list(block.tensor.shape)}, and only a matrix can have one"
    n, shape = block.tensor.shape[1], list(vectors.shape)
    if vectors.ndim != 2 or shape[0] != n or not 1 <= shape[1] <= n:
        return f"has shape {shape}: it must be [{n}, r] with r from 1 to {n}"
    if not vectors.is_floating_point() or not bool(torch.isfinite(vectors).all()):
        return "holds a value that is not a finite number"
    with torch.no_grad():  # float64 is never made in less
        gram = vectors.double().t() @ vectors.double()
        away = (gram - torch.eye(shape[1], dtype=gram.dtype, device=gram.device)).abs().max().item()
    return None if away <= ORTHONORMAL else f"has columns that are not orthonormal: V^T V is off by {away:.1e}"


def basis_name(name: str) -> str:
    """Of the noise R of a block: what it is keyed by in place of the block's own name."""
    return f"{name}#basis"


def low_rank_noise(
    name: str, vectors: torch.Tensor, key: Key, rows: int, distribution: Distribution = "gaussian"
) -> torch.Tensor:
    """sqrt(n / r) * R V^T [rows, n] of a block, written out: the specification. Walking never needs it whole."""
    n, r = vectors.shape
    noise = standard_noise(basis_name(name), key, torch.Size((rows, r)), distribution, vectors.dtype, vectors.device)
    with torch.no_grad(), full_precision(vectors.device):
        return math.sqrt(n / r) * (noise @ vectors.t())


def low_rank_dot(
    name: str, vectors: torch.Tensor, key: Key, gradient: torch.Tensor, distribution: Distribution = "gaussian"
) -> float:
    """<sqrt(n / r) * R V^T, G> for a gradient G [m, n] of the block: sqrt(n / r) * <R, G V>, from m * r numbers."""
    n, r = vectors.shape
    with torch.no_grad(), full_precision(vectors.device):
        along = gradient.detach().to(vectors.dtype) @ vectors
    return math.sqrt(n / r) * noise_dot(along.contiguous().view(-1), basis_name(name), key, distribution)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices are made in float32, whatever the process has chosen for speed (TF32, autocast).

    A move that brings theta back and updates it is one product: rounded to fewer bits, it would lose the update.
    """
    before = [getattr(module, name) for module, name, _ in _SWITCHES]
    try:
        for module, name, exact in _SWITCHES:
            setattr(module, name, exact)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (module, name, _), value in zip(_SWITCHES, before, strict=True):
            setattr(module, name, value)


_MATMUL = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
_WAYS: tuple[tuple[str, Any], ...] = (
    ("fp32_precision", "ieee"),
    ("allow_tf32", False),
)  # the second where torch does not know the first
_SWITCHES: list[tuple[Any, str, Any]] = [
    known
    for owner in _MATMUL
    # No further than the first: torch 2.9 warns where the old one is looked at.
    if (known := next(((owner, name, exact) for name, exact in _WAYS if hasattr(owner, name)), None))
]
"""What makes matrix products less precise: (owner, attribute, its value for full precision)."""


class DirectionOperator(ABC):
    """Replaces the noise of the blocks it covers: u_b = factor * sigma_b * s_b.

    Two are equal only where they are the same object. s_b must be the same bits each time, as long as a perturbation or
    a pending move along it exists: call ``theta.restore()`` before changing a tensor that it is computed from.
    """

    def covers(self, index: int) -> bool:
        """Whether the operator replaces the noise of block ``index``; by default that of every block."""
        return True

    @abstractmethod
    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        """s_b: a new tensor of the block's shape on its device, at least float32. It lives for one move of one block.

        A coordinate has mean square 1, unless the docstring of the operator says otherwise.
        """


@dataclass(frozen=True)
class Direction:
    """A recipe, never a tensor: u_b = factor * (sigma[b] * z_b + basis_sigma[b] * sqrt(n / r) * R_b V_b^T).

    z_b and R_b are standard noise, V_b the block's vectors in ``basis`` [n, r]. Without a basis, the first term is all.
    For blocks that the operator ``shape`` covers, u_b = factor * sigma[b] * s_b with what it writes.

    Raises:
        ValueError: a scale is negative or not finite, there is one along a basis that does not exist, or both a basis
            and a shape are given.
    """

    key: Key
    sigma: tuple[float, ...]
    """One scale per block, in the order of the blocks."""
    distribution: Distribution = "gaussian"
    factor: float = 1.0
    """Common to all blocks; set by the normalizer."""
    centre: tuple[float, ...] | None = None
    """A number near each block's mean, for :meth:`PerturbedParameters.moments` after a two-sided evaluation along this
    direction: the sums it needs are then taken in the traversal from one side to the other. None: no sums are taken."""
    basis: Basis | None = None
    """Directions are equal only where they have the same object as basis."""
    basis_sigma: tuple[float, ...] = ()
    """One scale per block where there is a basis, 0 for blocks that it leaves out: like sigma the root mean square of
    a coordinate. All 0: the direction without a basis."""
    shape: DirectionOperator | None = None
    """Replaces the noise in the blocks that it covers."""

    def __post_init__(self) -> None:
        for name, values in (("sigma", self.sigma), ("basis_sigma", self.basis_sigma)):
            bad = next((value for value in values if not 0.0 <= value < float("inf")), None)
            if bad is not None:
                raise ValueError(f"{name} is {bad}: it must be finite and not negative; the tuner or its input is broken")
        if self.basis is not None and self.shape is not None:
            raise ValueError("a direction goes along a basis or a shape, not both: take a tuner without a basis")
        if len(self.basis_sigma) != (0 if self.basis is None else len(self.sigma)):
            raise ValueError(
                f"basis_sigma has {len(self.basis_sigma)} scales for {len(self.sigma)} blocks: it needs one per block "
                "where there is a basis, and none where there is not"
            )
        vectors = {} if self.basis is None else self.basis.vectors
        bare = next((i for i, value in enumerate(self.basis_sigma) if value and i not in vectors), None)
        if bare is not None:
            raise ValueError(f"basis_sigma of block {bare} is {self.basis_sigma[bare]}, but it has no basis: it must be 0")

    @property
    def only_noise(self) -> bool:
        """Whether every block moves along its dense noise alone."""
        return self.shape is None and not self.along_basis

    @property
    def along_basis(self) -> bool:
        """Whether any block moves along its basis."""
        return any(self.basis_sigma)

    def shaped(self, index: int) -> bool:
        """Whether the operator covers block ``index``."""
        return self.shape is not None and self.shape.covers(index)

    def scales(self, amounts: Sequence[float]) -> list[float]:
        """Factor of each block's noise integers in ``amounts[b] * u_b``; 0 where an operator covers the block."""
        unit = self.factor / standard_deviation(self.distribution)
        found = [amount * sigma * unit for amount, sigma in zip(amounts, self.sigma, strict=True)]
        return found if self.shape is None else [0.0 if self.shaped(i) else scale for i, scale in enumerate(found)]


@dataclass(frozen=True, eq=False)
class Move:
    """The parameters move by ``amounts[b] * u_b``."""

    direction: Direction
    amounts: tuple[float, ...]
    rows: Mapping[int, Tensor] = field(default_factory=dict)
    """Of the blocks listed, only these rows move."""

    def dense(self, index: int) -> bool:
        """Whether a block moves along its dense noise."""
        return bool(self.amounts[index] * self.direction.sigma[index]) and not self.direction.shaped(index)

    def term(self, indices: Sequence[int]) -> NoiseTerm:
        """The dense noise to add to pieces of these blocks."""
        scales = self.direction.scales(self.amounts)
        return NoiseTerm(self.direction.key, [(scales[i],) for i in indices], self.direction.distribution)

    def basis_term(self, indices: Sequence[int]) -> NoiseTerm:
        """The noise R to add to the left factors of these blocks."""
        return NoiseTerm(self.direction.key, [(self.basis_scale(i),) for i in indices], self.direction.distribution)

    def shape_scale(self, index: int) -> float:
        """Factor of s_b of block ``index``; 0 where no operator covers it."""
        direction, amount = self.direction, self.amounts[index]
        return amount * direction.factor * direction.sigma[index] if direction.shaped(index) else 0.0

    def basis_scale(self, index: int) -> float:
        """Factor of the integers of R of block ``index``; 0 without a basis."""
        direction, amount = self.direction, self.amounts[index]
        if direction.basis is None or not direction.basis_sigma[index]:
            return 0.0
        unit = direction.factor / standard_deviation(direction.distribution)
        return amount * direction.basis_sigma[index] * direction.basis.spread(index) * unit
