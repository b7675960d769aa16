"""Measured memory: peaks, what is in use, what is left."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from l2l.report import memory
from l2l.report.memory import PeakMemory, available_bytes, cgroup_folders, cgroup_room, current_bytes, return_freed_memory

MIB = 2**20
TOLERANCE = 8 * MIB
"""Pages are counted in batches, and the interpreter breathes."""


@contextmanager
def held(mebibytes: int) -> Iterator[None]:
    """Pages of the kernel itself, written to so that they are resident: an allocator may hand out what it kept."""
    with mmap.mmap(-1, mebibytes * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
        yield


def use(mebibytes: int, seconds: float = 0.0) -> None:
    """Hold that much for a moment."""
    with held(mebibytes):
        time.sleep(seconds)


def check_that_peaks_are_seen(seconds: float = 0.0) -> None:
    with PeakMemory() as first:
        use(200, seconds)
    with PeakMemory() as second:
        pass
    assert abs(first.rise - 200 * MIB) < TOLERANCE
    assert second.rise < TOLERANCE
    assert first.bytes == first.start + first.rise


def test_the_peak_rises_by_what_was_allocated_and_the_next_use_starts_anew():
    check_that_peaks_are_seen()


def test_an_inner_measurement_does_not_hide_the_outer_peak():
    with PeakMemory() as outer:
        use(100)
        with PeakMemory() as inner:
            use(40)
    assert abs(outer.rise - 100 * MIB) < TOLERANCE
    assert abs(inner.rise - 40 * MIB) < TOLERANCE


def test_where_the_mark_cannot_be_reset_a_thread_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_reset_peak", lambda device: False)
    check_that_peaks_are_seen(seconds=50 * memory._SAMPLE_SECONDS)  # the thread must come to run, on a busy machine too


def test_without_proc_the_peak_of_the_whole_life_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    with PeakMemory() as peak:
        pass
    assert peak.bytes == peak.start > 10 * MIB


def test_a_peak_is_told_even_if_the_block_raises():
    with pytest.raises(KeyboardInterrupt), PeakMemory() as peak:
        raise KeyboardInterrupt
    assert peak.bytes > 0


def test_memory_in_use_and_left_are_plausible():
    before = current_bytes()
    with held(100):
        assert abs(current_bytes() - before - 100 * MIB) < TOLERANCE
        assert available_bytes() > 100 * MIB


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)
    return folder


def test_the_room_in_a_control_group_counts_cached_files_as_free(tmp_path: Path):
    second = write(tmp_path / "v2", max="1000\n", current="700\n", stat="anon 500\ninactive_file 150\n")
    first = write(tmp_path / "v1", limit_in_bytes="2000\n", usage_in_bytes="900\n", stat="cache 5\ntotal_inactive_file 100\n")
    assert cgroup_room(second) == 450
    assert cgroup_room(first) == 1200
    assert cgroup_room(write(tmp_path / "free", max="max\n", current="1\n")) is None
    assert cgroup_room(write(tmp_path / "none")) is None
    assert cgroup_room(write(tmp_path / "over", max="10", current="70")) == 0


def test_the_groups_of_a_process_are_found_with_their_ancestors(tmp_path: Path):
    table = tmp_path / "table"
    table.write_text("5:cpu:/x\n4:memory:/a/b\n0::/c\n")
    for name in ("memory/a/b", "c", "cpu/x"):
        (tmp_path / name).mkdir(parents=True)
    found = [str(folder.relative_to(tmp_path)) for folder in cgroup_folders(table, tmp_path)]
    assert found == ["memory/a/b", "memory/a", "memory", "c", "."]
    assert cgroup_folders(tmp_path / "absent", tmp_path) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_peak_is_that_of_tensors():
    with PeakMemory("cuda") as peak:
        block = torch.empty(25 * MIB, device="cuda")
        del block
    assert peak.rise == 100 * MIB
    assert available_bytes("cuda") > 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_freed_tensors_left_in_the_heap_is_given_back():
    small = [torch.ones(24 * 1024) for _ in range(1000)]  # 94 MiB in blocks that come from the heap, not from mappings
    last, small = small[-1], None  # on top of the heap, so that nothing below is given back without being asked
    before = current_bytes()
    return_freed_memory()
    assert before - current_bytes() > 60 * MIB
    assert last.sum() == 24 * 1024
