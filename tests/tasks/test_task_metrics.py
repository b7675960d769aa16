"""Metrics by hand, the benchmarks' own among them, and bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from l2l.tasks import get_task
from l2l.tasks.evaluate import Scores
from l2l.tasks.metrics import (
    accuracy,
    answer_scores,
    bootstrap_interval,
    format_interval,
    grouped_scores,
    span_scores,
)


def one(prediction: str, *alternatives: list[str]) -> tuple[float, float]:
    scores = span_scores([prediction], [alternatives])
    return scores["f1"], scores["exact_match"]


@pytest.mark.parametrize(
    ("prediction", "alternatives", "expected"),
    [
        ("5", [["5"]], (1.0, 1.0)),
        ("5.0", [["5"]], (1.0, 1.0)),
        ("5,000", [["5000"]], (1.0, 1.0)),
        ("5 yards", [["5"]], (0.67, 0.0)),
        ("6 yards", [["5 yards"]], (0.0, 0.0)),  # the number is wrong, so that the shared word counts for nothing
        ("the Titans", [["Titans"]], (1.0, 1.0)),
        ("Tom Brady!", [["tom brady"]], (1.0, 1.0)),
        ("Brady", [["Tom Brady"]], (0.67, 0.0)),
        ("three-family homes", [["three family homes"]], (1.0, 1.0)),
        ("Hindi", [["Hindi", "Kannada"]], (0.5, 0.0)),
        ("Hindi and Kannada", [["Hindi", "Kannada"]], (0.25, 0.0)),
        ("Romo", [["4"], ["Tony Romo"], ["Romo"]], (1.0, 1.0)),
        ("", [["Romo"]], (0.0, 0.0)),
    ],
)
def test_drop_compares_numbers_by_value_and_asks_for_every_span(prediction, alternatives, expected):
    assert one(prediction, *alternatives) == pytest.approx(expected)


def test_drop_is_a_mean_over_examples_and_refuses_empty_references():
    scores = span_scores(["5", "6"], [[["5"]], [["5"]]])
    assert scores == {"f1": 0.5, "exact_match": 0.5}
    with pytest.raises(ValueError, match="cannot score 1 predictions against 2"):
        span_scores(["5"], [[["5"]], [["5"]]])
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="example 0 has no reference answer"):
            span_scores(["5"], [empty])


def test_multirc_is_f1_over_answers_and_exact_over_questions():
    groups = ["a", "a", "b", "b", "c"]
    gold = [True, False, True, True, False]
    scores = grouped_scores(groups, [True, False, True, False, True], gold)
    assert scores["f1a"] == pytest.approx(2 * 2 / (3 + 3))  # precision 2 of 3, recall 2 of 3
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert grouped_scores(groups, gold, gold) == {"f1a": 1.0, "exact_match": 1.0}
    assert grouped_scores(["a"], [False], [False]) == {"f1a": 0.0, "exact_match": 1.0}
    with pytest.raises(ValueError, match="cannot score 1 predictions against 1 answers, 0 groups"):
        grouped_scores([], [True], [True])


def official(name: str, rows: list[dict], texts: list[str]) -> dict[str, float]:
    found = get_task(name).official
    assert found is not None
    return found(rows, texts)


def test_multirc_groups_answers_by_paragraph_and_question():
    rows = [
        {"paragraph": paragraph, "question": "Who?", "answer": "x", "label": label}
        for paragraph, label in (("P", 1), ("P", 0), ("Q", 1))
    ]
    assert official("multirc", rows, ["Yes", "Yes", "Yes"]) == pytest.approx({"f1a": 0.8, "exact_match": 0.5})


def test_squad_counts_an_exact_answer_up_to_case_articles_and_punctuation():
    rows = [{"answers": {"text": ["Lima", "the city"]}}] * 3
    assert official("squad", rows, ["City.", "lima", "Lima city"])["exact_match"] == pytest.approx(2 / 3)


def test_record_scores_the_text_of_the_entity_against_all_answers():
    row = {
        "passage": "P",
        "query": "Ask @placeholder.",
        "entities": ["Bill Gates", "Gates", "Ann"],
        "answers": ["Bill Gates"],
    }
    options = get_task("record").example(row).options
    assert official("record", [row], [options[0]]) == {"f1": 1.0, "exact_match": 1.0}
    assert official("record", [row], [options[1]]) == pytest.approx({"f1": 2 / 3, "exact_match": 0.0})
    assert official("record", [row, row], [options[0], options[2]]) == {"f1": 0.5, "exact_match": 0.5}


def test_drop_reads_the_release_s_answers_where_a_row_has_them():
    flat = {"passage": "P", "question": "Q", "answers_spans": {"spans": ["Hindi", "Kannada"]}}
    date = {"number": "", "spans": [], "date": {"day": "9", "month": "May", "year": "1950"}}
    full = flat | {"answer": {"number": "", "spans": ["Hindi", "Kannada"], "date": {}}}
    assert official("drop", [flat], ["Hindi"]) == {"f1": 1.0, "exact_match": 1.0}
    assert official("drop", [full], ["Hindi"]) == {"f1": 0.5, "exact_match": 0.0}
    validated = full | {"validated_answers": [date, {"number": "7", "spans": [], "date": {}}]}
    assert official("drop", [validated] * 3, ["9 May 1950", "7.0", "8"]) == pytest.approx({"f1": 2 / 3, "exact_match": 2 / 3})


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "exact"),
    [
        ("The  Lima!", ["lima"], 1.0, 1.0),
        ("city of Lima", ["Lima"], 0.5, 0.0),
        ("Lima city", ["Cusco", "the city Lima in Peru"], 2 * 1.0 * 0.5 / 1.5, 0.0),
        ("Cusco", ["Lima"], 0.0, 0.0),
        ("", ["Lima"], 0.0, 0.0),
        ("a b b", ["b b b"], 0.8, 0.0),
    ],
)
def test_f1_and_exact_match_follow_squads_rule(prediction, answers, f1, exact):
    assert answer_scores([prediction], [answers]) == (pytest.approx(f1), exact)


def test_scores_are_means_over_examples():
    f1, exact = answer_scores(["Lima", "x", "city of Lima"], [["Lima"], ["y"], ["Lima"]])
    assert (f1, exact) == (pytest.approx(0.5), pytest.approx(1 / 3))
    assert accuracy([0, 2, 1], [(0,), (0, 2), (2,)]) == pytest.approx(2 / 3)


def test_scores_of_nothing_or_of_uneven_lists_are_errors():
    with pytest.raises(ValueError, match="0 predictions"):
        accuracy([], [])
    with pytest.raises(ValueError, match="1 predictions against 2"):
        answer_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="example 1 has no reference answer"):
        answer_scores(["a", "b"], [["a"], []])


def test_of_many_rows_the_interval_is_that_of_the_normal_approximation():
    low, high = bootstrap_interval([1.0] * 700 + [0.0] * 300)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=4e-3)


def test_it_holds_the_true_mean_in_about_19_of_20_samples():
    draw = np.random.default_rng(0)
    ends = [bootstrap_interval((draw.random(200) < 0.6).astype(float).tolist(), resamples=500) for _ in range(200)]
    assert 0.90 <= np.mean([low <= 0.6 <= high for low, high in ends]) <= 0.99


def test_the_same_scores_give_the_same_interval_and_another_seed_nearly_so():
    scores = np.random.default_rng(1).random(50).tolist()
    assert bootstrap_interval(scores) == bootstrap_interval(scores)
    assert bootstrap_interval(scores, seed=1) == pytest.approx(bootstrap_interval(scores), abs=0.02)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores)


def test_scores_that_are_all_alike_give_an_interval_without_width():
    assert bootstrap_interval([0.5] * 4) == (0.5, 0.5)


def test_many_rows_are_drawn_in_chunks_that_change_nothing(monkeypatch):
    scores = np.random.default_rng(2).random(300).tolist()
    whole = bootstrap_interval(scores)
    monkeypatch.setattr("l2l.tasks.metrics._AT_ONCE", 1000)
    assert bootstrap_interval(scores) == pytest.approx(whole, abs=1e-12)


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([])


def test_a_summary_holds_the_interval_and_no_row_by_itself():
    plain = Scores(1.0, "accuracy", 0.5, 2, rowwise=(1.0, 0.0)).plain()
    assert plain["interval"] == [0.0, 1.0]
    assert "rowwise" not in plain


def test_a_value_is_written_with_its_interval():
    assert format_interval(0.7123, (0.6709, 0.7516)) == "0.712 [0.671, 0.752]"
