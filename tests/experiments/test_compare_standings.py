"""Ranks and wins, by hand."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from l2l.experiments.stats import average_ranks, by_rank, rank_intervals, rank_of, win_shares, wins

LOSSES = np.array(
    [
        [[1.0, 3.0, 2.0], [1.0, 1.0, 4.0]],  # means 1, 2, 3: ranks 1, 2, 3
        [[5.0, 4.0, 4.0], [5.0, 4.0, 4.0]],  # means 5, 4, 4: ranks 3, 1.5, 1.5
    ]
)
"""[two cells, two seeds, three methods]."""


def test_the_lowest_has_rank_one_and_those_that_tie_share_their_ranks():
    means = np.array([2.0, 1.0, 2.0, 3.0])
    assert [float(rank_of(means, column)) for column in range(4)] == [2.5, 1.0, 2.5, 4.0]


def test_ranks_are_by_the_mean_over_the_seeds_and_averaged_over_cells():
    assert average_ranks(LOSSES) == [2.0, 1.75, 2.25]
    assert by_rank(["a", "b", "c"], LOSSES) == ["b", "a", "c"]


def test_one_diverged_seed_puts_a_method_last_and_two_such_methods_tie():
    losses = np.array([[[inf, 1.0, 0.1], [0.1, 2.0, inf]]])
    assert average_ranks(losses) == [2.5, 1.0, 2.5]
    assert wins(losses).tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_a_win_is_a_lower_mean_and_a_tie_is_none():
    assert wins(LOSSES).tolist() == [[0, 1, 1], [1, 0, 1], [1, 0, 0]]
    assert win_shares(LOSSES)[0] == [0.0, 0.5, 0.5]


def test_intervals_hold_the_average_rank_and_are_points_where_cells_and_seeds_agree():
    for (low, high), rank in zip(rank_intervals(LOSSES, 200), average_ranks(LOSSES), strict=True):
        assert 1 <= low <= rank <= high <= 3
    same = np.array([[[1.0, 2.0], [1.0, 2.0]]] * 3)
    assert rank_intervals(same, 50) == [(1.0, 1.0), (2.0, 2.0)]
    assert rank_intervals(LOSSES, 200) == rank_intervals(LOSSES, 200)


def test_the_interval_of_two_cells_that_disagree_reaches_from_one_to_the_other():
    losses = np.array([[[1.0, 2.0]], [[2.0, 1.0]]])
    assert rank_intervals(losses, 400) == [pytest.approx((1.0, 2.0))] * 2
