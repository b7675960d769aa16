"""The key that fixes the noise, and the rounding of the scales it is multiplied by."""

import math
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

Distribution: TypeAlias = Literal["gaussian", "rademacher", "packed_rademacher"]

PACKED = 32
"""Draws of ``packed_rademacher`` that share one hash of an element: a bit each."""

GAUSSIAN_SD = math.sqrt(4 * (256**2 - 1) / 12)
"""Standard deviation of the sum of four independent uniform bytes (147.8005...)."""

INTEGER_BITS = 12
"""Bits kept free in a product: noise integers lie in [-510, 510]; the rest belongs to the scale."""

_MANTISSA_BITS = {torch.float16: 24, torch.bfloat16: 24, torch.float32: 24, torch.float64: 53}
"""Half precision is computed in float32."""


@dataclass(frozen=True)
class Key:
    """(seed, step, draw): with a block's name and an element's index it fixes every noise value."""

    seed: int
    step: int = 0
    draw: int = 0

    def __post_init__(self) -> None:
        try:
            struct.pack("<qqq", self.seed, self.step, self.draw)
        except struct.error as error:
            text = f"seed={self.seed}, step={self.step}, draw={self.draw}"
            raise ValueError(f"{text} must be integers of at most 64 bits") from error

    def with_draw(self, draw: int) -> "Key":
        """The same seed and step, another draw."""
        return replace(self, draw=draw)

    def hashed_by(self, distribution: Distribution) -> tuple["Key", int]:
        """The key of the hash that the noise is made of, and how far to shift it to the left before."""
        if distribution != "packed_rademacher":
            return self, 0
        return self.with_draw(self.draw // PACKED), self.draw % PACKED

    def words(self, name: str, high: int = 0) -> tuple[int, int]:
        """Two 32-bit words for elements ``[high * 2**32, (high + 1) * 2**32)`` of block ``name``."""
        return _words(self.seed, self.step, self.draw, name, high)


@lru_cache(maxsize=65536)
def _words(seed: int, step: int, draw: int, name: str, high: int) -> tuple[int, int]:
    digest = blake2b(struct.pack("<qqqq", seed, step, draw, high) + name.encode(), digest_size=8).digest()
    first, second = struct.unpack("<II", digest)
    return first, second


def standard_deviation(distribution: Distribution) -> float:
    """Standard deviation of the noise integers: dividing by it gives unit variance.

    Raises:
        ValueError: no such distribution.
    """
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution={distribution!r} must be {' or '.join(map(repr, get_args(Distribution)))}")
    return GAUSSIAN_SD if distribution == "gaussian" else 1.0


@lru_cache(maxsize=4096)  # the blocks of one direction mostly share their scale
def round_scale(scale: float, dtype: torch.dtype) -> float:
    """``scale`` rounded so that scale x integer is exact in ``dtype`` (12 significant bits in float32, 41 in float64).

    The sum ``weight + scale * integer`` is then rounded once, whether or not the hardware fuses multiply and add.

    Raises:
        ValueError: ``scale`` is not finite, or overflows ``dtype``.
    """
    if not abs(scale) * 2.0**INTEGER_BITS < torch.finfo(torch.promote_types(dtype, torch.float32)).max:
        raise ValueError(f"noise scale is {scale}; it must be finite in {dtype}: check sigma, epsilon, lr and the loss")
    bits = _MANTISSA_BITS[dtype] - INTEGER_BITS
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def round_scales(scales: np.ndarray) -> np.ndarray:
    """:func:`round_scale` of float64 ``scales``, for float32. ValueError where one is not finite, or overflows."""
    wrong = ~(np.abs(scales) * 2.0**INTEGER_BITS < np.finfo(np.float32).max)
    if wrong.any():
        round_scale(float(scales[wrong][0]), torch.float32)
    bits = _MANTISSA_BITS[torch.float32] - INTEGER_BITS
    mantissa, exponent = np.frexp(scales)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)) + 0.0, exponent - bits)  # + 0.0: -0.0 becomes 0.0, as there
