"""What the noise is: held against an independent implementation in Python integers, and against statistics."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

import pytest
import torch

from l2l.noise import Distribution, Key, integers, noise_dot, standard_deviation, standard_noise

MASK = 2**32 - 1


def byte_sum_or_sign(name: str, key: Key, index: int, distribution: Distribution) -> int:
    """One element of the stream, from the written design alone."""
    group, bit = divmod(key.draw, 32) if distribution == "packed_rademacher" else (key.draw, 0)
    text = struct.pack("<qqqq", key.seed, key.step, group, index >> 32) + name.encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    x = ((index & MASK) + (word & MASK)) & MASK
    x = (x ^ (x >> 17)) * 0xED5AD4BB & MASK
    x ^= word >> 32
    x = (x ^ (x >> 11)) * 0xAC4C1B51 & MASK
    x = (x ^ (x >> 15)) * 0x31848BAB & MASK
    x ^= x >> 14
    return sum(x.to_bytes(4, "little")) - 510 if distribution == "gaussian" else 1 - 2 * (x >> (31 - bit) & 1)


GOLDEN: list[tuple[str, Key, int, list[int], list[int]]] = [
    ("weight", Key(0), 0, [97, 52, -37, -165, 124, -23], [-1, 1, -1, 1, -1, -1]),
    (
        "model.layers.0.mlp.up_proj.weight",
        Key(42, 1999, 2),
        12345,
        [-190, -68, -96, 105, -59, 175],
        [1, 1, -1, 1, -1, -1],
    ),
    ("weight", Key(-1, 2**40), 2**32 - 3, [-28, 13, -87, 262, -197, -19], [1, -1, 1, -1, 1, 1]),
]
"""(block, key, offset, gaussian integers, rademacher integers): the stream must never change, or no run replays."""


@pytest.mark.parametrize(("name", "key", "offset", "gaussian", "rademacher"), GOLDEN)
def test_the_stream_has_not_changed(name: str, key: Key, offset: int, gaussian: list[int], rademacher: list[int]):
    assert integers(name, key, 6, offset=offset).tolist() == gaussian
    assert integers(name, key, 6, "rademacher", offset=offset).tolist() == rademacher


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "packed_rademacher"])
@pytest.mark.parametrize("offset", [0, 1, 32767, 2**31 - 50, 2**32 - 50, 5 * 2**32 - 1])
@pytest.mark.parametrize("draw", [0, 31, 33])
def test_it_is_the_stream_that_the_design_describes(distribution: Distribution, offset: int, draw: int):
    key = Key(11, 22, draw)
    wanted = [byte_sum_or_sign("a.b", key, index, distribution) for index in range(offset, offset + 100)]
    assert integers("a.b", key, 100, distribution, offset).tolist() == wanted


def test_a_block_is_the_same_whole_or_in_shards(key: Key):
    whole = integers("w", key, 100_000)
    parts = [integers("w", key, size, offset=at) for at, size in ((0, 1), (1, 32_768), (32_769, 67_231))]
    assert torch.equal(whole, torch.cat(parts))


def test_values_depend_on_nothing_that_was_drawn_before(key: Key):
    first = integers("w", key, 1000)
    integers("other", Key(1), 77)
    torch.manual_seed(1)
    assert torch.equal(first, integers("w", key, 1000))


@pytest.mark.parametrize(
    ("name", "other"),
    [("v", Key(7, 3)), ("w", Key(8, 3)), ("w", Key(7, 4)), ("w", Key(7, 3, 1)), ("w", Key(3, 7)), ("w", Key(0, 3, 7))],
)
def test_another_name_seed_step_or_draw_gives_independent_noise(name: str, other: Key, key: Key):
    count = 2**18
    left = standard_noise("w", key, torch.Size([count]), dtype=torch.float64)
    right = standard_noise(name, other, torch.Size([count]), dtype=torch.float64)
    assert abs(torch.dot(left, right).item()) / math.sqrt(count) < 4.5


@pytest.mark.parametrize(("distribution", "kurtosis"), [("gaussian", 2.7), ("rademacher", 1.0), ("packed_rademacher", 1.0)])
def test_mean_variance_and_kurtosis_are_those_declared(distribution: Distribution, kurtosis: float):
    count = 2**20
    z = standard_noise("w", Key(5), torch.Size([count]), distribution, torch.float64)
    assert abs(z.mean().item()) < 4.5 / math.sqrt(count)
    assert z.square().mean().item() == pytest.approx(1.0, abs=4.5 * math.sqrt((kurtosis - 0.999) / count))
    assert z.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.01)


@pytest.mark.parametrize("lag", [1, 2, 64, 768, 32_768])
def test_neighbours_are_not_correlated(lag: int):
    z = standard_noise("w", Key(6), torch.Size([2**20]), dtype=torch.float64)
    assert abs(torch.dot(z[:-lag], z[lag:]).item()) / math.sqrt(len(z) - lag) < 4.5


def test_gaussian_integers_fill_their_range_and_rademacher_is_plus_or_minus_one():
    values = integers("w", Key(1), 2**20)
    assert values.dtype == torch.int32
    assert -510 <= values.min() < -460
    assert 460 < values.max() <= 510
    assert integers("w", Key(1), 1000, "rademacher").unique().tolist() == [-1, 1]


def test_standard_deviation_of_the_integers_is_exact_and_an_unknown_distribution_is_refused():
    assert standard_deviation("gaussian") == pytest.approx(147.8005, abs=1e-4)
    assert standard_deviation("rademacher") == 1.0
    unknown: Any = "normal"
    with pytest.raises(ValueError, match="distribution='normal' must be 'gaussian' or 'rademacher'"):
        standard_deviation(unknown)


def test_noise_dot_is_the_inner_product_with_the_noise(key: Key):
    values = torch.randn(70_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = standard_noise("w", key, torch.Size([70_000]), dtype=torch.float64)
    assert noise_dot(values, "w", key) == pytest.approx(torch.dot(values, z).item(), rel=1e-12)
    split = noise_dot(values[:40_001], "w", key) + noise_dot(values[40_001:], "w", key, offset=40_001)
    assert split == pytest.approx(torch.dot(values, z).item(), rel=1e-12)


def test_noise_has_the_shape_and_dtype_asked_for(key: Key):
    z = standard_noise("w", key, torch.Size([3, 5]), dtype=torch.float64)
    assert z.shape == (3, 5)
    assert z.dtype == torch.float64
