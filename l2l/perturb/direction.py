"""Where to look, and moves along it: recipes, never tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from l2l.noise import Distribution, Key, Term, standard_deviation


@dataclass(frozen=True)
class Direction:
    """A recipe, never a tensor: u_b = factor * sigma[b] * z_b, with z_b of unit variance."""

    key: Key
    sigma: tuple[float, ...]
    """One scale per block, in the order of the blocks."""
    distribution: Distribution = "gaussian"
    factor: float = 1.0
    """Common to all blocks: what a normaliser makes of sigma."""
    centre: tuple[float, ...] | None = None
    """A number near each block's mean, where :meth:`Theta.moments` will be asked for after a look along this direction:
    the sums they need are then taken on the way from one side to the other. None: no sums are taken."""

    def __post_init__(self) -> None:
        bad = next((value for value in self.sigma if not 0.0 <= value < float("inf")), None)
        if bad is not None:
            raise ValueError(f"sigma is {bad}: it must be finite and not negative; the tuner or its input is broken")

    def scales(self, amounts: Sequence[float]) -> list[float]:
        """Per block, what the noise integers are multiplied by to move by ``amounts[b] * u_b``."""
        unit = self.factor / standard_deviation(self.distribution)
        return [amount * sigma * unit for amount, sigma in zip(amounts, self.sigma, strict=True)]


@dataclass(frozen=True, eq=False)
class Move:
    """Theta moves by ``amounts[b] * u_b``."""

    direction: Direction
    amounts: tuple[float, ...]
    rows: Mapping[int, Tensor] = field(default_factory=dict)
    """Of the blocks listed, only these rows move."""

    def reversed(self) -> Move:
        """The move back."""
        return Move(self.direction, tuple(-amount for amount in self.amounts), self.rows)

    @property
    def nowhere(self) -> bool:
        """Whether nothing moves."""
        return not any(self.amounts)

    def term(self, indices: Sequence[int]) -> Term:
        """The noise to add to pieces of these blocks."""
        scales = self.direction.scales(self.amounts)
        return Term(self.direction.key, [(scales[i],) for i in indices], self.direction.distribution)
