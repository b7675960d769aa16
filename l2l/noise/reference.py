"""What the noise means, in plain torch: the specification that every other backend equals bit for bit.

A keyed 32-bit hash of the element index (three multiplications, in the manner of "triple32") gives four bytes.
``gaussian`` is their sum less 510: mean 0, standard deviation 147.8005, kurtosis 2.7, an exact integer.
``rademacher`` is the sign of the top bit. Only integer arithmetic, one exact product and one rounding are involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from l2l.noise.key import Distribution, Key, round_scale, standard_deviation

CHUNK = 32768
"""Elements per pass: torch's grain size, so that small operations stay on one thread and in cache."""

_WORD = 2**32


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    # int32 shifts are arithmetic; the mask makes them logical.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _hash(start: int, count: int, words: tuple[int, int], device: torch.device) -> Tensor:
    x = torch.arange(count, dtype=torch.int32, device=device)
    x.add_(_signed(start + words[0]))
    _xor_shift_(x, 17).mul_(_signed(0xED5AD4BB)).bitwise_xor_(_signed(words[1]))
    _xor_shift_(x, 11).mul_(_signed(0xAC4C1B51))
    _xor_shift_(x, 15).mul_(_signed(0x31848BAB))
    return _xor_shift_(x, 14)


def _integers_of(x: Tensor, distribution: Distribution) -> Tensor:
    if distribution == "rademacher":
        return (x >> 31).mul_(2).add_(1)
    pairs = x.bitwise_and(0x00FF00FF).add_((x >> 8).bitwise_and_(0x00FF00FF))
    return pairs.bitwise_and(0xFFFF).add_(pairs >> 16).sub_(510)


def _chunks(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """(start within the tensor, length): at most CHUNK long, never across a multiple of 2**32."""
    at = 0
    while at < count:
        size = min(CHUNK, count - at, _WORD - (offset + at) % _WORD)
        yield at, size
        at += size


def integers(
    name: str,
    key: Key,
    count: int,
    distribution: Distribution = "gaussian",
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise integers [count] int32 of elements ``offset .. offset + count`` of block ``name``."""
    device = torch.device(device)
    out = torch.empty(count, dtype=torch.int32, device=device)
    for at, size in _chunks(offset, count):
        index = offset + at
        words = key.words(name, index // _WORD)
        out[at : at + size] = _integers_of(_hash(index % _WORD, size, words, device), distribution)
    return out


def standard_noise(
    name: str,
    key: Key,
    shape: torch.Size,
    distribution: Distribution = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Materialised noise of mean 0 and variance 1, of ``shape``. For small tensors: training never needs it."""
    values = integers(name, key, shape.numel(), distribution, device=device)
    return (values.to(torch.float64) / standard_deviation(distribution)).to(dtype).view(shape)


def add_noise_(
    flat: Tensor,
    name: str,
    key: Key,
    scales: Sequence[float],
    distribution: Distribution = "gaussian",
    offset: int = 0,
) -> None:
    """``flat += scale * integers`` for each scale in turn, in place, generating the noise once.

    Args:
        flat: [count] contiguous view of (a shard of) block ``name``.
        scales: already divided by :func:`standard_deviation`; rounded here, so that each product is exact.
        offset: index of ``flat[0]`` within the whole block.
    """
    rounded = [round_scale(scale, flat.dtype) for scale in scales]
    exact = torch.promote_types(flat.dtype, torch.float32)  # half precision would round the integers themselves
    for at, size in _chunks(offset, flat.numel()):
        index = offset + at
        words = key.words(name, index // _WORD)
        values = _integers_of(_hash(index % _WORD, size, words, flat.device), distribution).to(exact)
        part = flat[at : at + size]
        for scale in rounded:
            part.add_(values, alpha=scale)


def noise_dot(flat: Tensor, name: str, key: Key, distribution: Distribution = "gaussian", offset: int = 0) -> float:
    """Inner product of ``flat`` [count] with the standard noise of block ``name``, summed in float64 per chunk."""
    total = 0.0
    for at, size in _chunks(offset, flat.numel()):
        index = offset + at
        words = key.words(name, index // _WORD)
        values = _integers_of(_hash(index % _WORD, size, words, flat.device), distribution)
        total += torch.dot(flat[at : at + size].double(), values.double()).item()
    return total / standard_deviation(distribution)
