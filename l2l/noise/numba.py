"""The CPU backend for machines without a C compiler. Its kernels, in ``numba_kernel``, are compiled by numba."""

from collections.abc import Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from threading import Lock

import numpy as np
import torch

from l2l.interrupts import complete
from l2l.noise.reference import LANES
from l2l.noise.table import PLACES, Plan

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


def run_plans(plans: Sequence[Plan]) -> list[np.ndarray]:
    """Carries out the plans in turn; lane sums of each piece's chunks, [chunks, 5, LANES] each, where one wants them."""
    return [lanes for found in complete(partial(_run, plan) for plan in plans) for lanes in found]


def _run(plan: Plan) -> list[np.ndarray]:
    threads = torch.get_num_threads()  # before numba starts its own: where both use OpenMP, that sets torch's number too
    from l2l.noise import numba_kernel as kernels  # where the first noise is made: numba takes seconds to import

    numba, table = kernels.numba, plan.table
    # Kernels take columns; where nothing is stored apart from the source, source and target are one array to them.
    columns = [np.ascontiguousarray(table[name]) for name in PLACES]
    apart = bool(np.any((table["target"] != 0) & (table["target"] != table["source"])))
    sums = np.empty((plan.chunks, 5, LANES))
    with _ONE_LAUNCH:
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
        try:
            if plan.gather:
                kernels.gathering(plan.shape, apart)(*columns, plan.tasks, sums)
            else:
                kernels.adding(plan.shape, apart)(*columns, plan.tasks, plan.shifts, plan.amounts)
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
    return np.split(sums, plan.ends[:-1]) if plan.gather else []
