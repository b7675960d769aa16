"""The CPU backend, float32 and bfloat16: ``native.c``, on as many threads as torch uses.

The library is compiled on first use and kept in a cache. Safe when several processes start at once.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from l2l.noise.reference import LANES
from l2l.noise.table import Plan


def available() -> str | None:
    """Why this backend cannot run, or None where it can."""
    if library() is not None:
        return None
    if compiler() is None:
        return "no C compiler is on PATH"
    return f"the C compiler failed, or none of {', '.join(map(str, folders()))} can be written"


class _Job(ctypes.Structure):
    """The struct ``job`` of ``native.c``: one traversal, shared by all threads that work on it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pieces", "sums", "shifts", "amounts", "then", "keys")),
        *((name, ctypes.c_int64) for name in ("n", "tasks", "next", "terms", "streams")),
        *((name, ctypes.c_int32) for name in ("half", "first", "second", "rademacher", "rounding")),
    ]


def run_plans(plans: Sequence[Plan]) -> list[np.ndarray]:
    """Carries out plans of the same pieces, chunk by chunk, each in turn: an element is read from memory once. Lane sums of
    each piece's chunks, [chunks, 5, LANES] each, where they are wanted, of a single plan."""
    compiled = library()
    assert compiled is not None, "available() was not asked"
    plan = plans[0]
    sums = np.empty((plan.chunks, 5, LANES)) if plan.gather else None
    jobs = [_job(own, sums) for own in plans]
    for before, after in pairwise(jobs):
        before.then = ctypes.addressof(after)
    job = jobs[0]
    threads = min(torch.get_num_threads(), plan.tasks)
    if threads < 2:
        compiled.add_noise(ctypes.byref(job))
    elif (parallel := _torch_threads()) is not None:
        parallel(compiled.add_noise, ctypes.byref(job), threads, 0)
    else:
        helpers = [_POOL.submit(compiled.add_noise, ctypes.byref(job)) for _ in range(threads - 1)]
        compiled.add_noise(ctypes.byref(job))
        for helper in helpers:
            helper.result()
    return [] if sums is None else np.split(sums, plan.ends[:-1])


def _job(plan: Plan, sums: np.ndarray | None) -> _Job:
    shape, drawn = plan.shape, (plan.shifts.ctypes.data, plan.amounts.ctypes.data)
    kind = shape.half, shape.first, shape.second, shape.rademacher, shape.stochastic
    keys, streams = (None, 0) if plan.keys is None else (plan.keys.ctypes.data, len(plan.shifts))
    memory = plan.table.ctypes.data, None if sums is None else sums.ctypes.data, *drawn, None, keys
    return _Job(*memory, len(plan.table), plan.tasks, 0, plan.amounts.shape[1], streams, *kind)


@lru_cache(maxsize=1)
def _torch_threads() -> Callable[..., None] | None:
    """Runs a compiled function on the OpenMP threads that torch uses; None where torch uses others.

    After an operation these threads spin for some milliseconds, waiting for the next one. Threads of our own would
    compete with them for the cores, and that cost more than the noise itself: a step makes dozens of traversals.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not loaded, or a system where a process is no library
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_POOL = ThreadPoolExecutor(max_workers=256, thread_name_prefix="l2l-noise")
"""Threads that work beside the caller's. ctypes lets go of the interpreter while compiled code runs."""


HUGE = 2**21
"""Bytes of a huge page of x86 and of most ARM systems."""

COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1: make the pages of a range huge now. Older systems refuse it, and nothing changes."""


def use_huge_pages(tensors: Sequence[torch.Tensor]) -> int:
    """Lets the memory of contiguous CPU tensors lie on huge pages, where the system can; values stay. Bytes asked for.

    A traversal of 18 million weights then took 6 ms where it had taken 12: there are 512 times as many pages of 4 KiB, and
    each must be looked up. Takes up to 3 s per GiB, once.
    """
    filled: dict[int, int] = {}
    for tensor in tensors:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        for page in range(begin // HUGE, -(-end // HUGE)):
            filled[page] = filled.get(page, 0) + min(end, (page + 1) * HUGE) - max(begin, page * HUGE)
    pages = [page for page, size in sorted(filled.items()) if size > HUGE // 2]  # others hold more of something else
    if pages and sys.platform == "linux":
        advise = ctypes.CDLL(None).madvise
        for page in pages:
            advise(ctypes.c_void_p(page * HUGE), ctypes.c_size_t(HUGE), COLLAPSE)
    return len(pages) * HUGE


SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"
"""Where there is AVX-512: compilers prefer half its width, at which a stream took 1.3 ns per element where it now takes 0.8."""


def folders() -> tuple[Path, Path]:
    """Where the compiled library is looked for, and kept: the cache, else a folder for temporary files."""
    base = os.environ.get("L2L_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(base) / "l2l", Path(tempfile.gettempdir()) / f"l2l-{user}"


def compiler() -> str | None:
    """Path of the C compiler, or None."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _compiled(folder: Path) -> Path | None:
    info = Path("/proc/cpuinfo")  # what is built for the native processor depends on it
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    options = (*FLAGS, WIDE) if "avx512f" in flags else FLAGS
    built_for = " ".join((*options, platform.system(), platform.machine(), platform.processor(), flags))
    stamp = hashlib.blake2b(SOURCE.read_bytes() + built_for.encode(), digest_size=8).hexdigest()
    target = folder / f"noise-{stamp}.so"
    if folder.exists() and hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        return None  # code that another user could have put there is never loaded
    if target.exists():
        return target
    command = compiler()
    if command is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled beside the target, then renamed: two processes may race, and the loser's file is as good.
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        built = Path(beside) / target.name
        done = subprocess.run([command, *options, str(SOURCE), "-o", str(built)], capture_output=True, check=False)
        if done.returncode == 0:
            built.replace(target)
    return target if done.returncode == 0 else None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, built and cached on first use; None where it cannot be had."""
    for folder in folders():
        try:
            found = _compiled(folder)
            if found is not None:
                loaded = ctypes.CDLL(str(found))
                loaded.add_noise.argtypes, loaded.add_noise.restype = [ctypes.c_void_p], None
                return loaded
        except OSError:
            continue  # a cache that cannot be written or run: the next folder, then another backend
    return None
