"""Arguments of a traversal: where the elements lie, which noise is added to them, and which sums are taken of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from l2l.noise.key import Distribution, Key

WORD = 2**32
"""Elements that one pair of key words serves."""


@dataclass(frozen=True, eq=False)
class TensorSlice:
    """A contiguous run of elements of one block."""

    flat: torch.Tensor
    """[count] contiguous; read, and written unless ``into`` is given."""
    name: str
    """Of the block."""
    offset: int = 0
    """Index of ``flat[0]`` within the whole block."""
    into: torch.Tensor | None = None
    """[count] same dtype: written instead of ``flat``, which stays as it is (a transient copy)."""
    master: torch.Tensor | None = None
    """[count] float32: read and written; ``flat`` receives it rounded to its own dtype."""


@dataclass(frozen=True)
class NoiseTerm:
    """One stream of noise, and for each piece the scales it is added with, in turn."""

    key: Key
    scales: Sequence[tuple[float, ...]]
    """[pieces][adds], already divided by the noise's standard deviation; rounded where they are used."""
    distribution: Distribution = "gaussian"

    @property
    def packed_by(self) -> Key | None:
        """Key of the hash that it shares with other draws of ``packed_rademacher``; None for other distributions."""
        return self.key.hashed_by(self.distribution)[0] if self.distribution == "packed_rademacher" else None


def runs_of_terms(terms: Sequence[NoiseTerm]) -> Iterator[tuple[Key | None, list[NoiseTerm]]]:
    """Neighbouring terms that are bits of one hash, with its key; and those of other distributions, with None."""
    for key, run in groupby(terms, lambda term: term.packed_by):
        yield key, list(run)


@dataclass(frozen=True)
class MomentRequest:
    """Sums to take of the first term's noise u and of d = value + restoring * u - centre, value being what is written."""

    restoring: Sequence[float]
    """[pieces] scale that leads from what is written back to the unperturbed weights; rounded as scales are."""
    centre: Sequence[float]
    """[pieces] a number near the block's mean, so that a small variance is not lost in a large mean."""


@dataclass(frozen=True)
class Sums:
    """Sums over each piece, float64 [pieces]: what mean and variance after any step along u follow from."""

    d: np.ndarray
    dd: np.ndarray
    du: np.ndarray
    u: np.ndarray
    uu: np.ndarray


def shard_pieces(shard: torch.Tensor, name: str, columns: int, row: int = 0, column: int = 0) -> list[TensorSlice]:
    """Pieces of a shard [r, c] that lies at (row, column) of a block of ``columns`` columns; its rows are contiguous."""
    if shard.shape[1] == columns and shard.is_contiguous():
        return [TensorSlice(shard.view(-1), name, row * columns)]
    return [TensorSlice(line, name, (row + i) * columns + column) for i, line in enumerate(shard)]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)
