"""The rules of the protocol, on runs made by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest

from l2l.experiments.presets.meta_evaluate import Evidence, judge, pair_rows
from l2l.experiments.stats import (
    Cell,
    Run,
    RunTable,
    accuracy_counts,
    at_edge,
    choose,
    estimate,
    interval,
    majority_share,
    mean_by_x,
    mean_difference,
    median_ratio,
    pass_ratios,
    passes_to,
    smoothed,
    win_rate,
    win_shares,
)

ROLES = {"MeZO": "baseline-mezo", "DiZO": "baseline-dizo", "tuner": "tuner", "a": "control", "b": "control"}
PAIRS = [Cell("s", "full", "t"), Cell("s", "full", "u")]


def run(contender: str = "MeZO", task: str = "t", seed: int = 0, **given: Any) -> Run:
    same: dict[str, Any] = {"tuning": False, "point": {"lr": 1e-4}, "passes": 100, "train_loss": 1.0, "accuracy": 0.5}
    role = ROLES.get(contender, "tuner")
    return Run(Cell("s", "full", task), "m", contender, role, "mezo", None, seed, **same | given)


def table(runs: list[Run], cells: list[Cell] = PAIRS) -> RunTable:
    return RunTable.of(runs, cells, list(ROLES))


def tuned(lr: float, dev_loss: float) -> Run:
    return run(tuning=True, point={"lr": lr}, dev_loss=dev_loss)


def test_the_learning_rate_is_that_of_lowest_dev_loss():
    runs = [tuned(1e-4, 0.9), tuned(1e-3, 0.5), tuned(1e-2, 0.7)]
    assert choose(runs) == choose(runs[::-1]) == {"lr": 1e-3}


def test_of_tied_learning_rates_the_lower_one_is_taken():
    assert choose([tuned(1e-2, 0.5), tuned(1e-3, 0.5), tuned(1e-4, 0.6)]) == {"lr": 1e-3}
    betas = [run(point={"lr": "auto", "step_fraction": beta}, dev_loss=0.5) for beta in (0.4, 0.1, 0.2)]
    assert choose(betas) == {"lr": "auto", "step_fraction": 0.1}


def test_runs_that_diverged_are_chosen_only_where_all_did():
    assert choose([tuned(1e-4, inf), tuned(1e-3, 7.0), tuned(1e-5, nan)]) == {"lr": 1e-3}
    assert choose([tuned(1e-2, inf), tuned(1e-3, nan)]) == {"lr": 1e-3}
    with pytest.raises(ValueError, match="no tuning run"):
        choose([])


def test_a_choice_at_the_end_of_the_grid_is_told():
    assert at_edge({"lr": 1e-5}, [1e-5, 1e-4, 1e-3])
    assert at_edge({"lr": "auto", "step_fraction": 0.4}, [0.1, 0.4])
    assert not at_edge({"lr": 1e-4}, [1e-5, 1e-4, 1e-3])
    assert not at_edge({"lr": 1e-4}, [1e-4])


def test_values_are_ordered_by_pair_and_seed_and_leave_tuning_runs_out():
    runs = [run(seed=1, train_loss=2.0), run(seed=0, train_loss=1.0), run(seed=100, tuning=True, train_loss=9.0)]
    runs += [run(task="u", seed=seed, train_loss=3.0 + seed) for seed in (0, 1)]
    assert table(runs).values("MeZO", "train_loss").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="'MeZO'"):
        table(runs[1:]).values("MeZO", "train_loss")


STEEP = [(float(passes), 10.0 - passes) for passes in range(2, 12, 2)]
"""Losses 8, 6, 4, 2, 0 after 2, 4, 6, 8, 10 passes."""


def test_losses_are_averaged_over_a_window_of_passes_from_where_it_is_full():
    assert smoothed(STEEP, 4) == [(4, 7.0), (6, 5.0), (8, 3.0), (10, 1.0)]
    assert smoothed(STEEP, 1) == STEEP
    assert smoothed(STEEP, 11) == smoothed([], 4) == []
    uneven = [(2.0, 4.0), (4.0, 2.0), (24.0, 1.0)]  # a search of twenty passes
    assert smoothed(uneven, 4) == [(4.0, 3.0), (24.0, 1.0)]


def test_a_target_is_reached_when_the_smoothed_loss_is_first_at_or_below_it():
    assert passes_to(STEEP, 5.0, 4) == 6
    assert passes_to(STEEP, 4.9, 4) == 8
    assert passes_to(STEEP, 100.0, 4) == 4
    assert passes_to(STEEP, 0.9, 4) == inf
    assert passes_to([], 1.0, 4) == inf


def test_the_mean_of_curves_is_taken_point_by_point():
    assert mean_by_x([(4, 1.0), (2, 5.0), (4, 3.0)]) == [(2, 5.0), (4, 2.0)]


def test_pass_ratios_hold_runs_of_equal_seed_against_mezos_own_way_to_its_final_loss():
    flat = [(float(passes), 1.0 if passes >= 50 else 2.0) for passes in range(2, 102, 2)]
    early = [(float(passes), 1.0 if passes >= 20 else 2.0) for passes in range(2, 102, 2)]
    never = [(float(passes), 2.0) for passes in range(2, 102, 2)]
    runs = [run(seed=seed, curve=flat) for seed in range(3)]
    mine = [early, never, early]
    runs += [run("tuner", seed=seed, curve=curve, diverged=seed == 2) for seed, curve in enumerate(mine)]
    # A window of 10 passes is full of ones 8 passes after the first: at 58 and at 28.
    assert pass_ratios(table(runs, PAIRS[:1]), "tuner", "MeZO").tolist() == [[28 / 58, inf, inf]]
    assert pass_ratios(table(runs, PAIRS[:1]), "MeZO", "MeZO").tolist() == [[1.0, 1.0, 1.0]]
    fell = [run(seed=0, curve=flat, diverged=True), run("tuner", curve=early)]
    assert np.isnan(pass_ratios(table(fell, PAIRS[:1]), "tuner", "MeZO")).all()


@pytest.mark.parametrize(
    ("mezo", "tuner", "expected"),
    [
        (0.60, 0.70, "counted"),
        (0.60, 0.50, "counted"),  # a tuner that falls to chance is a loss, not an omission
        (0.52, 0.90, "chance"),  # not more than two points above the best constant answer
        (0.50, 0.50, "chance"),
        (0.99, 0.985, "ceiling"),
        (0.99, 0.98, "counted"),
    ],
)
def test_accuracy_counts_where_it_is_neither_at_chance_nor_at_the_ceiling(mezo, tuner, expected):
    assert accuracy_counts(mezo, tuner, 0.5) == expected


def test_the_best_constant_answer_is_the_option_that_is_right_most_often():
    assert majority_share([(0,), (1,), (1,), (2,)]) == 0.5
    assert majority_share([(0, 1), (1,)]) == 1.0
    assert majority_share([]) == 0.0


def columns(*pairs: tuple[list[float], list[float]]) -> np.ndarray:
    """[pairs, seeds, 2] from the seeds' values of two contenders per pair."""
    return np.stack([np.array(pair).T for pair in pairs])


def test_an_interval_of_equal_values_is_a_point():
    same = columns(([1.0, 1.0], [2.0, 2.0]), ([1.0, 1.0], [2.0, 2.0]))
    assert (estimate(same, mean_difference), interval(same, mean_difference)) == (-1.0, (-1.0, -1.0))
    assert (estimate(same, win_rate), interval(same, win_rate)) == (1.0, (1.0, 1.0))


def test_an_interval_holds_its_estimate_and_is_the_same_each_time():
    generator = np.random.default_rng(0)
    for pairs, seeds in ((1, 1), (2, 3), (8, 3)):
        table = generator.normal(size=(pairs, seeds, 2))
        for statistic in (win_rate, mean_difference, median_ratio):
            low, high = interval(table, statistic, resamples=200)
            assert low <= estimate(table, statistic) <= high
            assert (low, high) == interval(table, statistic, resamples=200)


def test_an_interval_of_a_mean_is_as_wide_as_the_spread_of_pairs_says():
    table = np.random.default_rng(0).normal(size=(100, 1, 2)) * [1.0, 0.0]
    low, high = interval(table, mean_difference)
    assert high - low == pytest.approx(2 * 1.96 * table[..., 0].std() / 10, rel=0.05)


def test_a_median_over_infinities_is_infinite_only_where_most_are():
    assert estimate(np.array([[[0.2], [inf], [0.4]]]), median_ratio) == 0.4
    assert estimate(np.array([[[0.2], [inf], [inf]]]), median_ratio) == inf


def made_by_hand() -> Evidence:
    """Two pairs, two seeds. The tuner beats MeZO on t only, DiZO and control a on both, b on none."""
    losses = {"MeZO": (2.0, 1.0), "DiZO": (3.0, 3.0), "tuner": (1.0, 2.0), "a": (4.0, 4.0), "b": (0.5, 0.5)}
    accuracy = {"MeZO": (0.7, 0.51), "tuner": (0.8, 0.9)}
    runs = [
        run(
            label,
            task,
            seed,
            train_loss=found[i],
            accuracy=accuracy.get(label, (0.5, 0.5))[i],
            curve=[(100.0, found[i])],
        )
        for label, found in losses.items()
        for i, task in enumerate("tu")
        for seed in range(2)
    ]
    return Evidence(table(runs), ROLES, dict.fromkeys(PAIRS, 0.5))


def test_the_verdict_of_runs_made_by_hand():
    found = judge(made_by_hand(), "tuner")
    assert found["win_rate_over_mezo"] == 0.5
    assert found["win_rate_over_dizo"] == 1.0
    assert found["win_rate_over_controls"] == 0.5
    assert found["win_rate_over_each_control"] == {"a": 1.0, "b": 0.0}
    assert found["lowest_win_rate_over_a_control"] == 0.0
    assert found["mean_loss_difference_to_mezo"] == 0.0
    assert found["mean_accuracy_gain"] == pytest.approx(10.0)  # MeZO is at chance on u
    assert found["mean_accuracy_gain_all_pairs"] == pytest.approx((10 + 39) / 2)
    assert found["pairs_in_accuracy_gain"] == 1
    assert found["median_pass_ratio_to_mezo_loss"] == inf  # half the runs never get there
    assert found["intervals"]["win_rate_over_mezo"] == [0.0, 1.0]


def test_pairs_and_matrix_say_what_the_verdict_is_made_of():
    evidence = made_by_hand()
    first, second = pair_rows(evidence, "tuner")
    assert (first["accuracy"], second["accuracy"]) == ("counted", "chance")
    assert first["mean_train_loss"]["tuner"] == 1.0
    assert first["pass_ratio_to_mezo_loss"] == [1.0, 1.0]
    matrix = win_shares(evidence.runs.losses)
    assert [matrix[i][i] for i in range(5)] == [0.0] * 5
    assert (matrix[2][0], matrix[0][2], matrix[4][2]) == (0.5, 0.5, 1.0)


def test_without_dizo_and_controls_their_figures_are_left_empty():
    evidence = made_by_hand()
    found = judge(replace(evidence, roles={"MeZO": "baseline-mezo", "tuner": "tuner"}), "tuner")
    assert found["win_rate_over_dizo"] is found["win_rate_over_controls"] is None
    assert found["win_rate_over_mezo"] == 0.5
