"""The compiled backend gives the bits of the reference, and its absence is no more than slower."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from l2l.noise import Distribution, Key, active_backend, add_noise_, integers, native, reference, round_scale
from l2l.noise.backend import VARIABLE

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty cache folders, and a library that is looked for anew."""
    monkeypatch.setenv("L2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def weights(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 0.02


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


@needs_compiler
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_native_equals_reference_bit_for_bit(distribution: Distribution):
    draw = random.Random(0)
    for case in range(60):
        count = draw.choice([1, 2, 7, 15, 16, 17, 1000, 32_768, 32_769, 70_001])
        offset = draw.choice([0, 1, 31, draw.randrange(2**31), 2**32 - 1, 2**32 - 500, 3 * 2**32 - 9])
        scales = [draw.choice([1, -1]) * 10 ** draw.uniform(-9, 0) for _ in range(draw.choice([1, 2, 3, 4]))]
        key = Key(draw.randrange(2**40), draw.randrange(10_000), draw.randrange(4))
        slow, fast = weights(count, case), weights(count, case)
        reference.add_noise_(slow, f"block{case}", key, scales, distribution, offset)
        native.add_noise_(fast, f"block{case}", key, scales, distribution, offset)
        assert torch.equal(bits(slow), bits(fast)), (count, offset, scales)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("base", [0, 2**32 - 20_000])
def test_a_tensor_moves_the_same_whole_or_in_two_shards(
    backend: str, base: int, key: Key, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(VARIABLE, backend)
    whole, parts = weights(50_000), weights(50_000)
    add_noise_(whole, "w", key, [1e-5, 3e-6], offset=base)
    add_noise_(parts[:33_333], "w", key, [1e-5, 3e-6], offset=base)
    add_noise_(parts[33_333:], "w", key, [1e-5, 3e-6], offset=base + 33_333)
    assert torch.equal(bits(whole), bits(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_it_adds_scale_times_integer_with_a_single_rounding(dtype: torch.dtype, distribution: Distribution, key: Key):
    start, moved = weights(5000, dtype=dtype), weights(5000, dtype=dtype)
    add_noise_(moved, "w", key, [3.3e-6], distribution)
    product = round_scale(3.3e-6, dtype) * integers("w", key, 5000, distribution).double()
    assert torch.equal(moved, (start.double() + product).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_in_single_precision_and_rounded_once(dtype: torch.dtype, key: Key):
    start = weights(5000).to(dtype)
    moved = start.clone()
    add_noise_(moved, "w", key, [3.3e-4])
    product = round_scale(3.3e-4, dtype) * integers("w", key, 5000).float()
    assert torch.equal(moved, (start.float() + product).to(dtype))


def test_several_scales_in_one_pass_equal_several_passes(key: Key):
    together, apart = weights(9000), weights(9000)
    scales = [1e-5, -2e-5, 7e-7]
    add_noise_(together, "w", key, scales)
    for scale in scales:
        add_noise_(apart, "w", key, [scale])
    assert torch.equal(bits(together), bits(apart))


def test_no_scale_and_no_element_change_nothing(key: Key):
    start = weights(100)
    moved = start.clone()
    add_noise_(moved, "w", key, [])
    add_noise_(moved[:0], "w", key, [1.0])
    assert torch.equal(start, moved)


def test_a_tensor_that_is_not_contiguous_is_refused(key: Key):
    with pytest.raises(ValueError, match="block 'w' needs a contiguous tensor"):
        add_noise_(weights(100)[::2], "w", key, [1.0])


def test_a_backend_can_be_forced_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert active_backend() == "reference"
    monkeypatch.setenv(VARIABLE, "cuda9")
    with pytest.raises(ValueError, match="L2L_NOISE='cuda9' is not a noise backend; use auto, native or reference"):
        active_backend()


@needs_compiler
def test_native_serves_float32_on_cpu_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "native")
    assert active_backend() == "native"
    assert active_backend("cpu", torch.float64) == "reference"
    assert active_backend("cuda") == "reference"


@needs_compiler
def test_a_library_is_built_once_and_then_found_in_the_cache(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    assert native.library() is not None
    (built,) = (uncached / "cache" / "l2l").iterdir()
    native.library.cache_clear()
    monkeypatch.setenv("PATH", str(uncached))
    assert native.library() is not None
    assert list((uncached / "cache" / "l2l").iterdir()) == [built]


def test_without_a_compiler_the_reference_serves(uncached: Path, monkeypatch: pytest.MonkeyPatch, key: Key):
    monkeypatch.setenv("PATH", str(uncached))
    assert native.library() is None
    assert active_backend() == "reference"
    add_noise_(moved := weights(100), "w", key, [1e-3])
    assert not torch.equal(moved, weights(100))
    with pytest.raises(RuntimeError, match="compiled noise library is not available"):
        native.add_noise_(moved, "w", key, [1e-3])


def test_native_cannot_be_forced_where_it_cannot_be_built(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(uncached))
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(ValueError, match="L2L_NOISE=native, but no C compiler"):
        active_backend()


def test_a_compiler_that_fails_leaves_the_reference_and_no_file(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    broken = uncached / "bin" / "cc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/bin:/usr/bin")
    assert native.library() is None
    assert active_backend() == "reference"
    assert not list((uncached / "cache" / "l2l").iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(
    uncached: Path, monkeypatch: pytest.MonkeyPatch
):
    (uncached / "file").write_text("in the way")
    monkeypatch.setenv("L2L_CACHE", str(uncached / "file"))
    assert native.library() is not None
    assert [path.suffix for folder in uncached.glob("l2l-*") for path in folder.iterdir()] == [".so"]


def test_without_any_folder_to_write_to_the_reference_serves(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    (uncached / "file").write_text("in the way")
    monkeypatch.setenv("L2L_CACHE", str(uncached / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(uncached / "file"))
    assert native.library() is None
    assert active_backend() == "reference"


@needs_compiler
def test_a_folder_of_another_user_is_not_trusted(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    assert native.library() is not None
    native.library.cache_clear()
    (uncached / "l2l-123456").mkdir()
    monkeypatch.setattr("os.getuid", lambda: 123_456)
    assert native.library() is None
