"""Intervals by resampling pairs, and seeds within them: what another draw of tasks and seeds might have shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
COVERAGE = 0.95
SEED = 0

Statistic: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""[resamples, pairs, seeds, columns] -> [resamples]."""


def estimate(table: NDArray[np.float64], statistic: Statistic) -> float:
    """The statistic of the table as it is, [pairs, seeds, columns]."""
    with np.errstate(invalid="ignore"):  # the difference of two runs that both diverged is not a number, and stays so
        return float(statistic(table[None])[0])


def interval(
    table: NDArray[np.float64], statistic: Statistic, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Percentile interval of a statistic of [pairs, seeds, columns], paired over the columns.

    Pairs are drawn with replacement, then seeds within each pair drawn; all columns (contenders) of a drawn run come
    along. Where the percentiles leave out the estimate itself, the interval is widened to hold it.
    """
    pairs, seeds, _ = table.shape
    generator = np.random.default_rng(seed)
    rows = generator.integers(pairs, size=(resamples, pairs, 1))
    columns = generator.integers(seeds, size=(resamples, pairs, seeds))
    with np.errstate(invalid="ignore"):
        found = np.sort(statistic(table[rows, columns]))
    centre = estimate(table, statistic)
    # Ranks, not interpolation: between a finite value and infinity there is nothing to interpolate.
    low, high = found[int((1 - COVERAGE) / 2 * resamples)], found[int((1 + COVERAGE) / 2 * resamples) - 1]
    return float(np.fmin(low, centre)), float(np.fmax(high, centre))


def win_rate(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of (pair, other) in which column 0 has the lower mean over the seeds; the others are the further columns."""
    means = table.mean(2)
    return (means[..., :1] < means[..., 1:]).mean((1, 2))


def mean_difference(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over pairs and seeds of column 0 less column 1."""
    return (table[..., 0] - table[..., 1]).mean((1, 2))


def median_ratio(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of column 0 over pairs and seeds."""
    return np.median(table[..., 0].reshape(len(table), -1), axis=1)
