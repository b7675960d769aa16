"""Ranks and wins over the cells of a comparison: pure functions of losses. Infinite: the run diverged, and loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from l2l.compare.bootstrap import interval

RANK_RESAMPLES = 2000

Losses = NDArray[np.float64]
"""[cells, seeds, methods] of final training loss; resampled ones have a further axis in front."""


def rank_of(means: NDArray[np.float64], column: int) -> NDArray[np.float64]:
    """Rank of a column along the last axis: 1 for the lowest; those that tie share the mean of their ranks."""
    own = means[..., column : column + 1]
    return 1 + (means < own).sum(-1) + ((means == own).sum(-1) - 1) / 2


def average_ranks(losses: Losses) -> list[float]:
    """Per method, the mean over cells of its rank by the mean loss over the seeds."""
    means = losses.mean(1)
    return [float(rank_of(means, column).mean()) for column in range(losses.shape[-1])]


def rank_intervals(losses: Losses, resamples: int = RANK_RESAMPLES) -> list[tuple[float, float]]:
    """Per method, the 95 % interval of its average rank over draws of cells, and of seeds within them."""

    def statistic(column: int):
        return lambda table: rank_of(table.mean(2), column).mean(1)

    return [interval(losses, statistic(column), resamples) for column in range(losses.shape[-1])]


def wins(losses: Losses) -> NDArray[np.int64]:
    """[methods, methods]: on how many cells the row's mean loss over the seeds is below the column's; a tie is no win."""
    means = losses.mean(1)
    return (means[:, :, None] < means[:, None, :]).sum(0)


def win_shares(losses: Losses) -> list[list[float]]:
    """:func:`wins` as shares of the cells."""
    return (wins(losses) / len(losses)).tolist()


def by_rank(labels: Sequence[str], losses: Losses) -> list[str]:
    """The labels by average rank, the best first; those that tie stay in order."""
    ranks = average_ranks(losses)
    return [labels[place] for place in sorted(range(len(labels)), key=lambda place: ranks[place])]
