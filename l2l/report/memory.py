"""How much memory there is, how much is in use, and the most that was in use while something ran."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import final

import torch

_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"
"""Written to clear_refs it makes Linux forget the high-water mark of the resident memory."""
_RESET_SLACK = 64 * 2**20
"""Just after a reset the mark may lie this far above what is resident: the kernel counts pages in batches."""
_SAMPLE_SECONDS = 0.002

_open: list[PeakMemory] = []
"""Measurements in progress. The mark belongs to the process: an inner measurement that resets it tells the outer."""


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
        self._sampler: _Sampler | None = None

    @property
    def rise(self) -> int:
        """Bytes by which the peak lies above the start."""
        return max(0, self.bytes - self.start)

    def __enter__(self) -> PeakMemory:
        for outer in _open:
            if outer.device.type == self.device.type:
                outer._note()
        self.start = self.bytes = current_bytes(self.device)
        if not _reset_peak(self.device) and (_PROC / "statm").exists():
            self._sampler = _Sampler()
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        self._note()
        if self._sampler is not None:
            self.bytes = max(self.bytes, self._sampler.end())

    def _note(self) -> None:
        # A sampled process has no mark of this block's own, only one of its whole life.
        if self._sampler is None:
            self.bytes = max(self.bytes, _peak(self.device))


def current_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes in use now: of tensors on CUDA, of the resident process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = _PROC / "statm"
    return _resident(statm) if statm.exists() else _lifetime_peak()


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that could still be taken: what the device has free, on the CPU at most what the control group allows."""
    device = torch.device(device)
    if device.type == "cuda":
        # What torch's allocator holds but no tensor uses is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    rooms = [room for folder in cgroup_folders(_PROC / "cgroup", _CGROUPS) if (room := cgroup_room(folder)) is not None]
    return min([_free(Path("/proc/meminfo")), *rooms])


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


def _entry(stat: Path, name: str) -> int:
    lines = stat.read_text().splitlines() if stat.exists() else []
    return next((int(value) for key, value in map(str.split, lines) if key == name), 0)


def _resident(statm: Path) -> int:
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _field(name: str, table: Path) -> int:
    """A row such as ``VmHWM:  1620 kB`` of a file of /proc, in bytes; 0 where there is no such row."""
    rows = (line.split() for line in table.read_text().splitlines())
    return next((int(row[1]) * 1024 for row in rows if row and row[0] == f"{name}:"), 0)


def _free(meminfo: Path) -> int:
    if meminfo.exists():
        return _field("MemAvailable", meminfo)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no /proc: all there is, used or not


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _PROC / "status"
    return _field("VmHWM", status) if status.exists() else _lifetime_peak()


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


@final
class _Sampler:
    """Looks at the resident memory again and again until it is told to end."""

    def __init__(self) -> None:
        self._most = _resident(_PROC / "statm")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._most = max(self._most, _resident(_PROC / "statm"))

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return max(self._most, _resident(_PROC / "statm"))
