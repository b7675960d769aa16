"""Building blocks of direction operators: thin matrices of noise, and masks; and groups of blocks.

Blocks are grouped by their place in the tree of modules, never by what a module is called.
"""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias, final

import numpy as np
import torch

from l2l.noise import Distribution, Key, NoiseTerm, TensorSlice, add_noise, computed_in, standard_deviation
from l2l.params.blocks import Block, Blocks
from l2l.params.direction import Direction, DirectionOperator, full_precision


def matrices(blocks: Blocks) -> frozenset[int]:
    """Indices of the blocks of two dimensions or more; of more, all but the first are taken as columns."""
    return frozenset(i for i, block in enumerate(blocks) if block.tensor.ndim >= 2 and block.numel)


def sides(block: Block) -> tuple[int, int]:
    """(rows, columns) of a block that is taken as a matrix."""
    rows = block.tensor.shape[0]
    return rows, block.numel // rows


def factor(block: Block, name: str, key: Key, shape: tuple[int, ...], distribution: Distribution = "gaussian") -> torch.Tensor:
    """Standard noise of ``shape`` that belongs to a block, under a name of its own: on its device, at least float32."""
    out = torch.zeros(shape, dtype=computed_in(block.tensor.dtype), device=block.tensor.device)
    term = NoiseTerm(key, [(1 / standard_deviation(distribution),)], distribution)
    add_noise([TensorSlice(out.view(-1), f"{block.name}#{name}" if name else block.name)], [term])
    return out


def plain(block: Block, key: Key, distribution: Distribution = "gaussian") -> torch.Tensor:
    """The block's own standard noise, of its shape, on its device, at least float32: its direction without an operator."""
    return factor(block, "", key, block.tensor.shape, distribution)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right.T`` in the precision of its factors, whatever the process or an evaluation has chosen for speed.

    A transient copy is made inside an evaluation, and its update outside: only so are both along the same direction.
    """
    with torch.no_grad(), full_precision(left.device):
        return left @ right.t()


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [n, r] that span those of ``matrix`` [n, r], r at most n."""
    with torch.no_grad():
        return torch.linalg.qr(matrix).Q


def spectral_rank(block: Block, rank: int, threshold: float) -> int:
    """How many singular values of a block lie above ``threshold`` times the largest: at least 1, at most ``rank``."""
    if not threshold:
        return rank
    matrix = block.tensor.detach().reshape(sides(block)).double()
    squares = torch.linalg.eigvalsh(matrix.t() @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.t())
    return min(rank, max(1, int((squares > threshold**2 * squares[-1]).sum())))


CHUNK = 2**20
"""Coordinates that are masked at a time, a multiple of eight: memory of a few MiB, whatever the block's size."""
LOWEST = -510
"""The least of the noise integers, each the sum of four bytes less 510."""


class Mask(ABC):
    """Selects the coordinates of a block that do not move."""

    @abstractmethod
    def clear_(self, moved: torch.Tensor, block: Block, index: int) -> torch.Tensor:
        """``moved``, of the block's shape and contiguous, with 0 in the coordinates that do not move: changed in place."""


@final
class Masked(DirectionOperator):
    """The noise, or what another operator writes, times a mask. A coordinate's mean square is 1 only where the mask is 1."""

    def __init__(self, mask: Mask, inner: DirectionOperator | None = None) -> None:
        self.mask, self.inner = mask, inner

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> torch.Tensor:
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

    def clear_(self, moved: torch.Tensor, block: Block, index: int) -> torch.Tensor:
        flat, (first, second) = moved.view(-1), thresholds(self._shares[index])
        for at in range(0, len(flat), CHUNK):
            some = flat[at : at + CHUNK]
            x, y = (torch.zeros(len(some), dtype=torch.float32, device=some.device) for _ in range(2))
            for out, name in ((x, "mask"), (y, "mask, ties")):  # times 1: the integers themselves
                add_noise([TensorSlice(out, f"{block.name}#{name}", at)], [NoiseTerm(self._key, [(1.0,)])])
            some.masked_fill_((x < first) | ((x == first) & (y < second)), 0)
        return moved


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

    def __init__(self, bits: Mapping[int, torch.Tensor]) -> None:
        self._bits = bits

    def clear_(self, moved: torch.Tensor, block: Block, index: int) -> torch.Tensor:
        bits, flat = self._bits.get(index), moved.view(-1)
        for at in range(0, 0 if bits is None else len(flat), CHUNK):
            assert bits is not None, "else there is nothing to go through"
            some = flat[at : at + CHUNK]
            own = bits[at // 8 : (at + CHUNK) // 8].to(some.device)
            moving = own[:, None].bitwise_right_shift(_places(own.device)).bitwise_and(1).view(-1)[: len(some)]
            some.masked_fill_(~moving.bool(), 0)
        return moved


def packed(moving: torch.Tensor) -> torch.Tensor:
    """Which coordinates move, booleans of any shape, as bits: uint8 [ceil(n / 8)]."""
    flat = moving.reshape(-1).to(torch.uint8)
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return eights.bitwise_left_shift(_places(flat.device)).sum(1, dtype=torch.uint8)


def packed_bytes(count: int) -> int:
    """Bytes of the bits for ``count`` coordinates."""
    return -(-count // 8)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly ``count`` of the scores, the largest, as booleans of their shape; of equal ones those that come first."""
    flat = scores.reshape(-1)
    if not 0 < count < len(flat):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = flat.kthvalue(len(flat) - count + 1).values
    found = flat > least
    found[(flat == least).nonzero().view(-1)[: count - int(found.sum())]] = True
    return found.view(scores.shape)


Group: TypeAlias = frozenset[int]
"""Indices of blocks."""


def layers(blocks: Blocks) -> tuple[list[list[int]], list[int]]:
    """(indices of the blocks of each layer, in their order; indices of those outside all layers).

    A layer is a member of the outermost numbered container (``model.layers.3``) that holds blocks in more than one member.
    Where there is no such container, each module that owns blocks is a layer, and none lies outside.
    """
    paths = {name: name.split(".") for name in blocks.names}
    members: defaultdict[str, set[str]] = defaultdict(set)  # the numbered members that hold blocks, of each container
    for path in paths.values():
        for at, part in enumerate(path):
            if part.isdigit():
                members[".".join(path[:at])].add(part)
    names = []
    for path in paths.values():
        numbered = (at for at, part in enumerate(path) if part.isdigit() and len(members[".".join(path[:at])]) > 1)
        names.append(".".join(path[: next(numbered, -1) + 1]))
    if not any(names):
        names = [name.rpartition(".")[0] or "." for name in blocks.names]
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name:
            found.setdefault(name, []).append(index)
    return list(found.values()), [index for index, name in enumerate(names) if not name]


def group_blocks(units: Sequence[Sequence[int]], count: int) -> list[Group]:
    """At most ``count`` groups of neighbouring units, as many units in each; no group is empty."""
    count = min(count, len(units))
    at = [k * count // len(units) for k in range(len(units))]
    return [frozenset(i for unit, a in zip(units, at, strict=True) if a == g for i in unit) for g in range(count)]


def matched(blocks: Blocks, patterns: Sequence[str]) -> list[Group]:
    """A group for each regular expression over names: the blocks for which it is the first that matches.

    Raises:
        ValueError: none matches some block, or one is left without a block.
    """
    found = [next((k for k, p in enumerate(patterns) if re.search(p, name)), None) for name in blocks.names]
    if None in found:
        name = blocks.names[found.index(None)]
        raise ValueError(f"patterns: none matches block {name!r}; a last pattern '' takes whatever is left")
    empty = next((p for k, p in enumerate(patterns) if k not in found), None)
    if empty is not None:
        raise ValueError(f"patterns: {empty!r} is left without a block; names look like {blocks.names[0]!r}")
    return [frozenset(i for i, k in enumerate(found) if k == group) for group in range(len(patterns))]


def layer_groups_of(direction: Direction, group: Group) -> Direction:
    """The direction with scale 0 in all blocks outside the group."""
    both = direction.sigma, direction.basis_sigma
    sigma, basis_sigma = (tuple(scale if i in group else 0.0 for i, scale in enumerate(scales)) for scales in both)
    return replace(direction, sigma=sigma, basis_sigma=basis_sigma)
