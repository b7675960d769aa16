"""The traversal compiled from ``native.c``: float32 and bfloat16 on CPU, on as many threads as torch uses.

``native.c`` compiled on first use, kept in a cache. Safe when several processes start at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from l2l.noise.key import Key
from l2l.noise.reference import LANES
from l2l.noise.slices import MomentRequest, NoiseTerm, Sums, TensorSlice
from l2l.noise.table import Plan, by_plan


def available() -> str | None:
    """Why this backend cannot run, or None where it can."""
    return None if library() is not None else problem()


def add_noise(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm] = (),
    gather: MomentRequest | None = None,
    rounding: Key | None = None,
    store: bool = True,
) -> Sums | None:
    """As :func:`l2l.noise.reference.traverse`, bit for bit, for pieces of one dtype, float32 or bfloat16.

    At most one stream added once or twice and then another once; with sums, one stream and rounding to nearest.
    """
    return by_plan(_run, pieces, terms, gather, rounding, store)


def _run(plan: Plan) -> np.ndarray | None:
    compiled = library()
    assert compiled is not None, "available() was not asked"
    sums = np.empty((plan.chunks, 5, LANES)) if plan.gather else None
    following = ctypes.c_int64(0)
    arguments = (
        *(plan.table.ctypes.data, len(plan.table), plan.tasks, ctypes.byref(following)),
        *(int(plan.half), plan.first, plan.second, int(plan.rademacher), int(plan.stochastic)),
        sums.ctypes.data if sums is not None else None,
    )
    threads = min(torch.get_num_threads(), plan.tasks)
    helpers = [_pool().submit(compiled.add_noise, *arguments) for _ in range(threads - 1)]
    compiled.add_noise(*arguments)
    for helper in helpers:
        helper.result()
    return sums


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads that work beside the caller's. ctypes lets go of the interpreter while compiled code runs."""
    return ThreadPoolExecutor(max_workers=256, thread_name_prefix="l2l-noise")


SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


def _processor() -> str:
    """What a library built for the native processor depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _user() -> int | str:
    """Who this is: a number, or where there are none the name."""
    return os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _cache_folder() -> Path:
    base = os.environ.get("L2L_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "l2l"


def folders() -> tuple[Path, Path]:
    """Where the compiled library is looked for, and kept: the cache, else a folder for temporary files."""
    return _cache_folder(), Path(tempfile.gettempdir()) / f"l2l-{_user()}"


def compiler() -> str | None:
    """Path of the C compiler, or None."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _build(command: str, target: Path) -> bool:
    """Compile beside the target, then rename: two processes may race, and the loser's file is as good."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        done = subprocess.run([command, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, check=False)
        if done.returncode == 0:
            built.replace(target)
        return done.returncode == 0


def _owned(folder: Path) -> bool:
    """Code that another user could have put there is never loaded."""
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _compiled(folder: Path) -> Path | None:
    stamp = hashlib.blake2b(SOURCE.read_bytes() + " ".join((*FLAGS, _processor())).encode(), digest_size=8).hexdigest()
    target = folder / f"noise-{stamp}.so"
    if folder.exists() and not _owned(folder):
        return None
    if target.exists():
        return target
    command = compiler()
    if command is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return target if _build(command, target) else None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, built and cached on first use; None where it cannot be had."""
    for folder in folders():
        try:
            found = _compiled(folder)
            if found is not None:
                return _declared(ctypes.CDLL(str(found)))
        except OSError:
            continue  # a cache that cannot be written or run: the next folder, then another backend
    return None


def problem() -> str:
    """Why there is no library."""
    if compiler() is None:
        return "no C compiler is on PATH"
    return f"the C compiler failed, or none of {', '.join(map(str, folders()))} can be written"


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.add_noise.argtypes = [pointer, whole, whole, pointer, flag, flag, flag, flag, flag, pointer]
    loaded.add_noise.restype = None
    return loaded
