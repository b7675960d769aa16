"""The traversal on CUDA: one launch over all tensors of a call. The kernels are in ``triton_kernel``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2l.noise.key import Key
from l2l.noise.reference import CHUNK, LANES, RUN, total
from l2l.noise.slices import MomentRequest, NoiseTerm, Sums, TensorSlice
from l2l.noise.table import Plan, plan

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


def add_noise(
    pieces: Sequence[TensorSlice],
    terms: Sequence[NoiseTerm] = (),
    gather: MomentRequest | None = None,
    rounding: Key | None = None,
    store: bool = True,
) -> Sums | None:
    """As :func:`l2l.noise.reference.traverse`, bit for bit, for pieces of one device, float32 or bfloat16.

    At most one stream added once or twice and then another once; with sums, one stream and rounding to nearest.
    Without sums nothing waits for the device.
    """
    made = plan(pieces, terms, gather, rounding, store)
    if not store and gather is None:
        return None
    device = pieces[0].flat.device if pieces else torch.device("cpu")
    with torch.cuda.device(device if device.type == "cuda" else -1):
        lanes = _run(made, device) if made.chunks else np.zeros((len(pieces), 5, LANES))
    return total(list(lanes[:, None])) if gather is not None and lanes is not None else None


def _run(made: Plan, device: torch.device) -> np.ndarray | None:
    """Lane sums of each piece [pieces, 5, LANES], where any are wanted."""
    kernels = import_module("l2l.noise.triton_kernel")
    table = torch.from_numpy(made.table.view(np.int64)).to(device)
    owners = _owners(made.table["first_chunk"].tobytes(), made.chunks, device)
    shape = {**_shape(made), "enable_fp_fusion": False}
    if not made.gather:
        kernels.add[(made.chunks,)](table, owners, **shape)
        return None
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
    return whole.view(-1, 5, LANES).cpu().numpy()


def _shape(made: Plan) -> dict[str, Any]:
    """What is constant within a compiled kernel."""
    places = np.concatenate([made.table[name] for name in ("source", "target", "copy")])
    return {
        "half": made.half,
        "first": made.first,
        "second": made.second,
        "rademacher": made.rademacher,
        "stochastic": made.stochastic,
        "store": bool(made.table["target"].any()),
        "copied": bool(made.table["copy"].any()),
        "aligned": not np.any(places % 16),
    }


def _fold(kernels: Any, rows: Tensor, ends: Tensor, out: Tensor) -> None:
    """Rows added in order, segment by segment: see ``fold``."""
    width = 5 * LANES
    padded = 1 << (width - 1).bit_length()
    kernels.fold[(len(ends),)](rows, ends, out, width, padded, num_warps=1, enable_fp_fusion=False)


@lru_cache(maxsize=16)
def _owners(first_chunks: bytes, chunks: int, device: torch.device) -> Tensor:
    """int32 [chunks] on the device: the part that each chunk belongs to. The same pieces ask for it again and again."""
    first = np.frombuffer(first_chunks, dtype=np.int64)
    counts = np.diff(first, append=chunks)
    return torch.from_numpy(np.repeat(np.arange(len(first), dtype=np.int32), counts)).to(device)
