"""The CUDA backend: one launch over all tensors of a call. Its kernels are in ``triton_kernel``."""

import os
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from l2l.interrupts import complete
from l2l.noise.reference import CHUNK, LANES, RUN
from l2l.noise.table import Plan

SLAB = 16384
"""Chunks per launch where sums are taken: it bounds the memory for their lanes to 160 MiB."""


def interpreted() -> bool:
    """Whether triton's interpreter is asked for: kernels then run on the CPU, slowly, to be tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """Why this backend cannot run, or None where it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def run_plans(plans: Sequence[Plan]) -> list[np.ndarray]:
    """Carries out the plans in turn; lane sums of each piece, [1, 5, LANES] each, where one wants them.

    Without sums nothing waits for the device.
    """
    return [lanes for found in complete(partial(_run, plan) for plan in plans) for lanes in found]


def _run(made: Plan) -> list[np.ndarray]:
    from l2l.noise import triton_kernel as kernels  # where the first noise is made: triton is installed only with CUDA

    device = made.device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        table = torch.from_numpy(made.table.view(np.int64)).to(device)
        owners = _owners(made.table["first_chunk"].tobytes(), made.chunks, device)
        places = np.concatenate([made.table[name] for name in ("source", "target", "copy")])
        shape = {**vars(made.shape), "aligned": not np.any(places % 16), "enable_fp_fusion": False}
        if not made.gather:
            shifts, amounts = (torch.from_numpy(x).to(device) for x in (made.shifts.view(np.int32), made.amounts))
            kernels.add[(made.chunks,)](table, owners, shifts, amounts, len(made.shifts), **shape)
            return []
        size = min(made.chunks, SLAB)
        lanes = torch.empty(size * (CHUNK // RUN) * 5 * LANES, device=device)
        sums = torch.empty((made.chunks, 5 * LANES), dtype=torch.float64, device=device)
        for begin in range(0, made.chunks, size):
            count = min(size, made.chunks - begin)
            kernels.add_and_sum[(count,)](table, owners, lanes, begin, **shape)
            runs = torch.arange(1, count + 1, device=device) * (CHUNK // RUN)
            _fold(kernels, lanes, runs, sums[begin : begin + count])
        whole = torch.empty((len(made.ends), 5 * LANES), dtype=torch.float64, device=device)
        _fold(kernels, sums, torch.from_numpy(made.ends).to(device), whole)
        return list(whole.view(-1, 1, 5, LANES).cpu().numpy())


def _fold(kernels: Any, rows: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """Rows added in order, segment by segment: see ``fold``."""
    width = 5 * LANES
    padded = 1 << (width - 1).bit_length()
    kernels.fold[(len(ends),)](rows, ends, out, width, padded, num_warps=1, enable_fp_fusion=False)


@lru_cache(maxsize=16)
def _owners(first_chunks: bytes, chunks: int, device: torch.device) -> torch.Tensor:
    """int32 [chunks] on the device: the part that each chunk belongs to. The same pieces ask for it again and again."""
    first = np.frombuffer(first_chunks, dtype=np.int64)
    counts = np.diff(first, append=chunks)
    return torch.from_numpy(np.repeat(np.arange(len(first), dtype=np.int32), counts)).to(device)
