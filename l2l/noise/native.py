"""The traversal compiled from ``native.c``: float32 and bfloat16 on CPU, on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from l2l.noise.build import library, problem
from l2l.noise.key import Key
from l2l.noise.pieces import MomentRequest, TensorSlice, Sums, NoiseTerm
from l2l.noise.reference import LANES
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
