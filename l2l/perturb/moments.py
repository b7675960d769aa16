"""Mean and variance of the weights of each block: measured, or in closed form after a step from sums taken before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l2l.blocks import Blocks
from l2l.noise import Gather, Piece, Sums, Term, traverse

Moments = tuple[tuple[float, float], ...]
"""(mean, unbiased variance) per block; the variance of a single number is 0."""


def moments_of(sums: Sums, counts: Sequence[int], centre: Sequence[float], scale: Sequence[float]) -> Moments:
    """Moments of w + scale * u, where ``sums`` are those of d = w - centre and of the noise integers u.

    sum(d + s u) = sum d + s sum u, and sum (d + s u)^2 = sum d^2 + 2 s sum d u + s^2 sum u^2: exact for any s.
    """
    n, s = np.array(counts, dtype=np.float64), np.array(scale, dtype=np.float64)
    first = sums.d + s * sums.u
    second = sums.dd + 2 * s * sums.du + s * s * sums.uu
    mean = np.array(centre, dtype=np.float32).astype(np.float64) + first / np.maximum(n, 1)
    spread = second - first * first / np.maximum(n, 1)
    variance = np.where(spread < 0, 0.0, spread) / np.maximum(n - 1, 1)  # not maximum: a NaN is not masked
    return tuple(zip(mean.tolist(), variance.tolist(), strict=True))


def measure(pieces: Sequence[Piece], centre: Sequence[float], terms: Sequence[Term] = ()) -> Moments:
    """Moments of the pieces with the terms added, by a traversal that writes nothing."""
    zero = [0.0] * len(pieces)
    sums = traverse(pieces, terms, Gather(zero, centre), store=False)
    assert sums is not None, "sums were asked for"
    return moments_of(sums, [piece.flat.numel() for piece in pieces], centre, zero)


def block_moments(blocks: Blocks) -> Moments:
    """Moments of blocks as they stand. Two traversals: the second about the mean that the first has found."""
    pieces = [Piece(block.flat, block.name) for block in blocks]
    about_zero = measure(pieces, [0.0] * len(pieces))
    return measure(pieces, [mean for mean, _ in about_zero])
