"""How much memory is available, how much is in use, and the most that was in use while something ran."""

import ctypes
import os
import threading
from pathlib import Path
from typing import final

import torch

_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"
"""Written to clear_refs it makes Linux forget the high-water mark of the resident memory."""
_RESET_SLACK = 64 * 2**20
"""Just after a reset the mark may lie this far above what is resident: the kernel counts pages in batches."""
_SAMPLE_SECONDS = 0.002

_open: "list[PeakMemory]" = []
"""Measurements in progress. The mark belongs to the process: before an inner measurement resets it, outer ones read it."""


@final
class PeakMemory:
    """The most memory in use while a ``with`` block runs. Blocks may be nested.

    On CUDA: bytes of tensors that torch's allocator held. On the CPU: resident bytes of the process, everything
    in it included, so compare ``bytes`` with ``start``. Linux keeps that mark exactly; where it cannot be reset a
    thread samples every 2 ms, and where there is no /proc the mark is that of the process's whole life.

    Args:
        device: whose memory; the CPU by default.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.start = 0
        """Bytes in use when the block began."""
        self.bytes = 0
        """Most bytes in use within the block; known when it has ended."""
        self._ended = threading.Event()
        self._sampler: threading.Thread | None = None

    @property
    def rise(self) -> int:
        """Bytes by which the peak lies above the start."""
        return max(0, self.bytes - self.start)

    def __enter__(self) -> "PeakMemory":
        for outer in _open:
            if outer.device.type == self.device.type:
                outer._read_mark()
        self.start = self.bytes = current_bytes(self.device)
        if not _reset_peak(self.device) and (_PROC / "status").exists():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        _open.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _open.remove(self)
        if self._sampler is not None:
            self._ended.set()
            self._sampler.join()
            self.bytes = max(self.bytes, current_bytes())
        self._read_mark()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, current_bytes())

    def _read_mark(self) -> None:
        # A process that is sampled has no mark of this block's own, only one of its whole life.
        if self._sampler is None:
            self.bytes = max(self.bytes, _peak(self.device))


def current_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes in use now: of tensors on CUDA, of the resident process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _entry(_PROC / "status", "VmRSS") or _lifetime_peak()


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that could still be taken: what the device has free, on the CPU at most what the control group allows."""
    device = torch.device(device)
    if device.type == "cuda":
        # What torch's allocator holds but no tensor uses is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rooms = [room for folder in cgroup_folders(_PROC / "cgroup", _CGROUPS) if (room := cgroup_room(folder)) is not None]
    return min([_entry(Path("/proc/meminfo"), "MemAvailable") or total, *rooms])


def return_freed_memory() -> None:
    """Give back to the system what freed tensors on the CPU have left in the C library's heap, where that is glibc.

    It keeps such memory for the next allocation, so that the process stays about as large as it has been.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def cgroup_folders(table: Path, root: Path) -> list[Path]:
    """Folders of the control groups that limit a process's memory, ancestors included, of either version.

    Args:
        table: ``/proc/self/cgroup``; a file that is absent means no groups.
        root: where control groups are mounted.
    """
    found: list[Path] = []
    for line in table.read_text().splitlines() if table.exists() else []:
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        own = top / inside.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(top) and folder.is_dir()]
    return found


def cgroup_room(folder: Path) -> int | None:
    """Bytes left below the limit of a control group; None where it sets none. Cached files count as room."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).exists() and (folder / used).exists():
            most = (folder / limit).read_text().strip()
            if most == "max":
                return None
            return max(0, int(most) - int((folder / used).read_text()) + _entry(folder / "memory.stat", cached))
    return None


def _entry(table: Path, name: str) -> int:
    """Bytes in a row such as ``VmHWM:  1620 kB`` or ``inactive_file 150``; 0 where there is no such row or file."""
    lines = table.read_text().splitlines() if table.exists() else []
    rows = (line.replace(":", " ").split() for line in lines if line.startswith(name))
    return next((int(row[1]) * (1024 if row[2:] == ["kB"] else 1) for row in rows if row[0] == name), 0)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _entry(_PROC / "status", "VmHWM") or _lifetime_peak()


def _reset_peak(device: torch.device) -> bool:
    """Forget the high-water mark; whether that worked."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return 0 < _peak(device) <= current_bytes(device) + _RESET_SLACK


def _lifetime_peak() -> int:
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
