"""The noise pass compiled from ``native.c`` on first use, where there is a C compiler. Same bits as the reference."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from l2l.noise.key import Distribution, Key, round_scale

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
_WORD = 2**32


def _processor() -> str:
    """What a library built for the native processor depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _cache_folder() -> Path:
    base = os.environ.get("L2L_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "l2l"


def _build(compiler: str, target: Path) -> bool:
    """Compile beside the target, then rename: two processes may race, and the loser's file is as good."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, check=False)
        if done.returncode == 0:
            built.replace(target)
        return done.returncode == 0


def _compiled(folder: Path) -> Path | None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    stamp = hashlib.blake2b(SOURCE.read_bytes() + " ".join((*FLAGS, _processor())).encode(), digest_size=8).hexdigest()
    target = folder / f"noise-{stamp}.so"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        return None  # code that another user could have put there is never loaded
    if target.exists():
        return target
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return target if _build(compiler, target) else None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, built and cached on first use; None where it cannot be had."""
    for folder in (_cache_folder(), Path(tempfile.gettempdir()) / f"l2l-{os.getuid()}"):
        try:
            found = _compiled(folder)
            if found is not None:
                loaded = ctypes.CDLL(str(found))
                loaded.add_noise.argtypes = [
                    ctypes.c_void_p,
                    ctypes.c_int64,
                    ctypes.c_uint32,
                    ctypes.c_uint32,
                    ctypes.c_uint32,
                    ctypes.c_int32,
                    ctypes.c_int32,
                    ctypes.c_float,
                    ctypes.c_float,
                ]
                loaded.add_noise.restype = None
                return loaded
        except OSError:
            continue  # a cache that cannot be written or run: the next folder, then the reference
    return None


def add_noise_(
    flat: Tensor,
    name: str,
    key: Key,
    scales: Sequence[float],
    distribution: Distribution = "gaussian",
    offset: int = 0,
) -> None:
    """``flat += scale * integers`` for each scale in turn; float32 on CPU, contiguous. See ``reference.add_noise_``."""
    compiled = library()
    if compiled is None:
        raise RuntimeError("the compiled noise library is not available; use the reference backend")
    rounded = [round_scale(scale, flat.dtype) for scale in scales]
    sign = int(distribution == "rademacher")
    at, count, pointer = 0, flat.numel(), flat.data_ptr()
    while at < count:
        index = offset + at
        size = min(count - at, _WORD - index % _WORD)
        words = key.words(name, index // _WORD)
        for pair in range(0, len(rounded), 2):
            first, second = (*rounded[pair : pair + 2], 0.0)[:2]
            both = int(pair + 1 < len(rounded))
            compiled.add_noise(pointer + 4 * at, size, index % _WORD, *words, sign, both, first, second)
        at += size
