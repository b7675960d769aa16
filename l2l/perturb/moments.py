"""Mean and variance of the weights of each block: measured, or in closed form after a step from sums taken before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from l2l.blocks import Blocks
from l2l.noise import MomentRequest, TensorSlice, Sums, NoiseTerm, add_noise
from l2l.perturb.part import Part

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


def measure(
    pieces: Sequence[TensorSlice],
    centre: Sequence[float],
    terms: Sequence[NoiseTerm] = (),
    parts: Mapping[int, Part] = MappingProxyType({}),
) -> Moments:
    """Moments of the pieces with the terms added, by a traversal that writes nothing.

    Args:
        parts: what is added to some of the pieces, whole blocks, along a basis; by their place.
    """
    zero = [0.0] * len(pieces)
    plain = [k for k in range(len(pieces)) if k not in parts]
    sums = Sums(*(np.zeros(len(pieces)) for _ in range(5)))
    _put(sums, plain, _sums([pieces[k] for k in plain], [centre[k] for k in plain], [_only(t, plain) for t in terms]))
    for k, part in parts.items():
        own = [_only(term, [k]) for term in terms]
        for at, wide in part.widened(pieces[k].flat):
            run = TensorSlice(wide.view(-1), pieces[k].name, pieces[k].offset + at * wide.shape[1])
            _put(sums, [k], _sums([run], [centre[k]], own))
    return moments_of(sums, [piece.flat.numel() for piece in pieces], centre, zero)


def _sums(pieces: Sequence[TensorSlice], centre: Sequence[float], terms: Sequence[NoiseTerm]) -> Sums:
    found = add_noise(pieces, terms, MomentRequest([0.0] * len(pieces), centre), store=False)
    assert found is not None, "sums were asked for"
    return found


def _put(sums: Sums, places: Sequence[int], found: Sums) -> None:
    for name, values in vars(found).items():
        getattr(sums, name)[list(places)] += values


def _only(term: NoiseTerm, places: Sequence[int]) -> NoiseTerm:
    return replace(term, scales=[term.scales[k] for k in places])


def block_moments(blocks: Blocks) -> Moments:
    """Moments of blocks as they stand. Two traversals: the second about the mean that the first has found."""
    pieces = [TensorSlice(block.flat, block.name) for block in blocks]
    about_zero = measure(pieces, [0.0] * len(pieces))
    return measure(pieces, [mean for mean, _ in about_zero])
