"""Directions that leave some coordinates where they are: which ones is drawn by a key, or kept as one bit for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from l2l.blocks import Block
from l2l.noise import Distribution, Key, TensorSlice, NoiseTerm, add_noise
from l2l.perturb.factors import plain
from l2l.perturb.shape import DirectionOperator

CHUNK = 2**20
"""Coordinates that are masked at a time, a multiple of eight: memory of a few MiB, whatever the block's size."""
LOWEST = -510
"""The least of the noise integers, each the sum of four bytes less 510."""


class Mask(ABC):
    """Says which coordinates of a block stay where they are."""

    @abstractmethod
    def clear_(self, moved: Tensor, block: Block, index: int) -> Tensor:
        """``moved``, of the block's shape and contiguous, with 0 in the coordinates that stay: changed in place."""


@final
class Masked(DirectionOperator):
    """The noise, or what another shape writes, times a mask. A coordinate's mean square is 1 only where the mask is 1."""

    def __init__(self, mask: Mask, inner: DirectionOperator | None = None) -> None:
        self.mask, self.inner = mask, inner

    def covers(self, index: int) -> bool:
        return True

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        shaped = self.inner is not None and self.inner.covers(index)
        moved = self.inner.write(block, index, key, distribution) if self.inner and shaped else None
        moved = plain(block, key, distribution) if moved is None else moved.contiguous()
        return self.mask.clear_(moved, block, index)


@final
class Drawn(Mask):
    """Every coordinate stays with its block's probability, each for itself. Made anew from the key: no memory.

    Args:
        shares: probability per block, 0 to 1; met within 1e-5.
    """

    def __init__(self, key: Key, shares: Sequence[float]) -> None:
        self._key, self._shares = key, shares

    def clear_(self, moved: Tensor, block: Block, index: int) -> Tensor:
        flat = moved.view(-1)
        for at in range(0, len(flat), CHUNK):
            some = flat[at : at + CHUNK]
            some.masked_fill_(self._staying(block, at, some, self._shares[index]), 0)
        return moved

    def _staying(self, block: Block, at: int, some: Tensor, share: float) -> Tensor:
        first, second = thresholds(share)
        x, y = (self._integers(f"{block.name}#{name}", at, some) for name in ("mask", "mask, ties"))
        return (x < first) | ((x == first) & (y < second))

    def _integers(self, name: str, at: int, some: Tensor) -> Tensor:
        out = torch.zeros(len(some), dtype=torch.float32, device=some.device)
        add_noise([TensorSlice(out, name, at)], [NoiseTerm(self._key, [(1.0,)])])  # by 1: the integers themselves
        return out


@lru_cache(maxsize=1024)
def thresholds(share: float) -> tuple[int, int]:
    """(t, s) such that of two noise integers x < t, or x = t and y < s, has the probability ``share``, within 1e-5.

    Raises:
        ValueError: it is no probability.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of coordinates that stay is {share}: it must be from 0 to 1")
    byte = np.ones(256, dtype=np.int64)
    counts = np.convolve(np.convolve(byte, byte), np.convolve(byte, byte))  # of 2^32, for -510, -509, ...
    below = np.concatenate([[0], np.cumsum(counts)]) / 2**32
    first = int(np.searchsorted(below, share, side="right")) - 1
    if first == len(counts):
        return LOWEST + first, LOWEST
    within = (share - below[first]) * 2**32 / counts[first]
    return LOWEST + first, LOWEST + int(np.argmin(np.abs(below - within)))


@final
class Stored(Mask):
    """Bits as :func:`packed` gives them, by index of the block; a block without any moves whole."""

    def __init__(self, bits: Mapping[int, Tensor]) -> None:
        self._bits = bits

    def clear_(self, moved: Tensor, block: Block, index: int) -> Tensor:
        bits, flat = self._bits.get(index), moved.view(-1)
        for at in range(0, 0 if bits is None else len(flat), CHUNK):
            assert bits is not None, "else there is nothing to go through"
            some = flat[at : at + CHUNK]
            moving = _unpacked(bits[at // 8 : (at + CHUNK) // 8].to(some.device), len(some))
            some.masked_fill_(~moving, 0)
        return moved


def packed(moving: Tensor) -> Tensor:
    """Which coordinates move, booleans of any shape, as bits: uint8 [ceil(n / 8)]."""
    flat = moving.reshape(-1).to(torch.uint8)
    eights = functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return eights.bitwise_left_shift(_places(flat.device)).sum(1, dtype=torch.uint8)


def packed_bytes(count: int) -> int:
    """Bytes of the bits for ``count`` coordinates."""
    return -(-count // 8)


def _unpacked(bits: Tensor, count: int) -> Tensor:
    return bits[:, None].bitwise_right_shift(_places(bits.device)).bitwise_and(1).view(-1)[:count].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def largest(scores: Tensor, count: int) -> Tensor:
    """Exactly ``count`` of the scores, the largest, as booleans of their shape; of equal ones those that come first."""
    flat = scores.reshape(-1)
    if not 0 < count < len(flat):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = flat.kthvalue(len(flat) - count + 1).values
    found = flat > least
    found[(flat == least).nonzero().view(-1)[: count - int(found.sum())]] = True
    return found.view(scores.shape)
