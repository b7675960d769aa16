"""Adding noise, whichever backend does it, and which backend that is."""

from __future__ import annotations

import random

import pytest
import torch
from noise_cases import same_bits

from l2l.noise import (
    Distribution,
    Key,
    NoiseTerm,
    TensorSlice,
    active_backend,
    add_noise,
    add_noise_to,
    backend_problem,
    integers,
    reference,
    round_scale,
)
from l2l.noise.dispatch import VARIABLE

needs_compiler = pytest.mark.skipif(backend_problem("native") is not None, reason="no C compiler here")
needs_numba = pytest.mark.skipif(backend_problem("numba") is not None, reason=str(backend_problem("numba")))
ALL = ["reference", pytest.param("native", marks=needs_compiler), pytest.param("numba", marks=needs_numba)]


def weights(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 0.02


@needs_compiler
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_native_equals_reference_bit_for_bit(distribution: Distribution, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "native")
    draw = random.Random(0)
    for case in range(60):
        count = draw.choice([1, 2, 7, 15, 16, 17, 1000, 32_768, 32_769, 70_001])
        offset = draw.choice([0, 1, 31, draw.randrange(2**31), 2**32 - 1, 2**32 - 500, 3 * 2**32 - 9])
        scales = tuple(draw.choice([1, -1]) * 10 ** draw.uniform(-9, 0) for _ in range(draw.choice([1, 2])))
        key = Key(draw.randrange(2**40), draw.randrange(10_000), draw.randrange(4))
        slow, fast = weights(count, case), weights(count, case)
        terms = [NoiseTerm(key, [scales], distribution)]
        reference.add_noise([TensorSlice(slow, f"block{case}", offset)], terms)
        add_noise([TensorSlice(fast, f"block{case}", offset)], terms)
        assert same_bits(slow, fast), (count, offset, scales)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("base", [0, 2**32 - 20_000])
def test_a_tensor_moves_the_same_whole_or_in_two_shards(backend: str, base: int, key: Key, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, backend)
    whole, parts = weights(50_000), weights(50_000)
    add_noise_to(whole, "w", key, [1e-5, 3e-6], offset=base)
    add_noise_to(parts[:33_333], "w", key, [1e-5, 3e-6], offset=base)
    add_noise_to(parts[33_333:], "w", key, [1e-5, 3e-6], offset=base + 33_333)
    assert same_bits(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_it_adds_scale_times_integer_with_a_single_rounding(dtype: torch.dtype, distribution: Distribution, key: Key):
    start, moved = weights(5000, dtype=dtype), weights(5000, dtype=dtype)
    add_noise_to(moved, "w", key, [3.3e-6], distribution)
    product = round_scale(3.3e-6, dtype) * integers("w", key, 5000, distribution).double()
    assert torch.equal(moved, (start.double() + product).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_in_single_precision_and_rounded_once(dtype: torch.dtype, key: Key):
    start = weights(5000).to(dtype)
    moved = start.clone()
    add_noise_to(moved, "w", key, [3.3e-4])
    product = round_scale(3.3e-4, dtype) * integers("w", key, 5000).float()
    assert torch.equal(moved, (start.float() + product).to(dtype))


def test_several_scales_in_one_pass_equal_several_passes(key: Key):
    together, apart = weights(9000), weights(9000)
    scales = [1e-5, -2e-5, 7e-7]
    add_noise_to(together, "w", key, scales)
    for scale in scales:
        add_noise_to(apart, "w", key, [scale])
    assert same_bits(together, apart)


def test_no_scale_and_no_element_change_nothing(key: Key):
    start = weights(100)
    moved = start.clone()
    add_noise_to(moved, "w", key, [])
    add_noise_to(moved[:0], "w", key, [1.0])
    assert torch.equal(start, moved)


def test_a_tensor_that_is_not_contiguous_is_refused(key: Key):
    with pytest.raises(ValueError, match="block 'w' needs a contiguous tensor"):
        add_noise_to(weights(100)[::2], "w", key, [1.0])


def test_a_backend_can_be_forced_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert active_backend() == "reference"
    monkeypatch.setenv(VARIABLE, "cuda9")
    with pytest.raises(ValueError, match="L2L_NOISE='cuda9' is not a noise backend; use auto, reference, native, numba"):
        active_backend()


@pytest.mark.parametrize("backend", ALL[1:])
def test_fast_backends_serve_float32_and_bfloat16_on_their_device(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, backend)
    assert active_backend() == backend
    assert active_backend("cpu", torch.bfloat16) == backend
    assert active_backend("cpu", torch.float64) == "reference"
    assert active_backend("cpu", torch.float16) == "reference"
    assert active_backend("cuda") == "reference"
