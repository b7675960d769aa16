"""The traversal compiled by numba: for CPUs without a C compiler. The kernels are in ``numba_kernel``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch

from l2l.noise.key import Key
from l2l.noise.reference import LANES
from l2l.noise.slices import MomentRequest, NoiseTerm, Sums, TensorSlice
from l2l.noise.table import PLACES, Plan, by_plan

_ONE_LAUNCH = Lock()
"""Some of numba's thread pools end the process when two threads launch at once."""


@lru_cache(maxsize=1)
def available() -> str | None:
    """Why this backend cannot run, or None where it can."""
    if find_spec("numba") is None:
        return "numba is not installed"
    try:
        import_module("numba")
    except ImportError as error:  # a numba that does not fit the numpy installed says so here
        return f"numba cannot be imported: {error}"
    return None


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
    numba: Any = import_module("numba")
    kernels = import_module("l2l.noise.numba_kernel")
    table = plan.table
    # Kernels take columns; where nothing is stored apart from the source, source and target are one array to them.
    columns = [np.ascontiguousarray(table[name]) for name in PLACES]
    apart = bool(np.any((table["target"] != 0) & (table["target"] != table["source"])))
    shape = kernels.Shape(
        half=plan.half,
        first=plan.first,
        second=plan.second,
        rademacher=plan.rademacher,
        stochastic=plan.stochastic,
        apart=apart,
        store=bool(table["target"].any()),
        copy=bool(table["copy"].any()),
    )
    sums = np.empty((plan.chunks, 5, LANES))
    with _ONE_LAUNCH:
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))
        try:
            if plan.gather:
                kernels.gathering(shape)(*columns, plan.tasks, sums)
            else:
                kernels.adding(shape)(*columns, plan.tasks)
        finally:
            numba.set_num_threads(before)
    return sums if plan.gather else None
