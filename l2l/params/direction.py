"""Directions and moves along them: recipes, never tensors.

A direction is keyed noise with one scale per block. A basis adds a low-rank term, and an operator (a mask, a low rank, a
guide, a metric) replaces the noise of the blocks it covers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from l2l.noise import Distribution, Key, NoiseTerm, standard_deviation
from l2l.params.basis import Basis
from l2l.params.blocks import Block


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
    """Theta moves by ``amounts[b] * u_b``."""

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
