"""Scales are rounded so that every product with a noise integer is exact."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from l2l.noise import round_scale

SCALES = [random.Random(1).choice([1, -1]) * 10 ** random.Random(i).uniform(-30, 8) for i in range(300)]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 12), (torch.bfloat16, 12), (torch.float16, 12), (torch.float64, 41)]
)
def test_a_rounded_scale_has_so_many_significant_bits_and_is_the_nearest(dtype: torch.dtype, bits: int):
    for scale in SCALES:
        rounded = round_scale(scale, dtype)
        mantissa = math.frexp(rounded)[0]
        assert math.ldexp(mantissa, bits).is_integer()
        assert abs(rounded - scale) <= 2.0**-bits * abs(scale)
        assert round_scale(rounded, dtype) == rounded


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1), (torch.float64, 17)])
def test_products_with_all_noise_integers_are_exact(dtype: torch.dtype, step: int):
    integers = torch.arange(-510, 511, step)
    for scale in SCALES[:60]:
        rounded = round_scale(scale, dtype)
        products = torch.tensor(rounded, dtype=dtype) * integers.to(dtype)
        assert [Fraction(value) for value in products.tolist()] == [Fraction(rounded) * n for n in integers.tolist()]


def test_twice_a_scale_rounds_to_twice_the_rounded_scale():
    assert all(round_scale(2 * scale, torch.float32) == 2 * round_scale(scale, torch.float32) for scale in SCALES)
    assert all(round_scale(-scale, torch.float32) == -round_scale(scale, torch.float32) for scale in SCALES)


def test_zero_stays_zero():
    assert round_scale(0.0, torch.float32) == 0.0


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e38])
def test_a_scale_that_is_not_finite_or_overflows_is_refused(scale: float):
    with pytest.raises(ValueError, match=r"noise scale is .*must be finite in torch.float32: check sigma"):
        round_scale(scale, torch.float32)
