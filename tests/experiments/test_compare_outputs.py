"""The tables, files, figures and the page of a comparison, from results made by hand."""

from __future__ import annotations

import csv
import json
import sys
from math import inf
from pathlib import Path

import pytest
from compared import result

from l2l.experiments.spec import MethodCosts
from l2l.experiments.stats import Cell, RunTable
from l2l.experiments.tables import (
    Table,
    Text,
    draw_curves,
    figures,
    markdown,
    markdown_table,
    mean_curves,
    memory,
    standing,
    standings,
    step_sizes,
    write_records,
)
from l2l.report.run_directory import clock
from l2l.train.runlog import TEXT, step_curve

ONE, TWO = Cell("tiny", "full", "one"), Cell("tiny", "full", "two")
LABELS = ["mezo", "dizo", "lozo"]
RESULTS = [
    result(ONE, "mezo", 2.0, 0.5),
    result(ONE, "mezo", 3.0, 0.6, seed=1),
    result(ONE, "dizo", 1.0, 0.9),
    result(ONE, "dizo", inf, 0.0, seed=1, diverged=True),
    result(ONE, "lozo", 1.0, 0.7),
    result(ONE, "lozo", 2.0, 0.7, seed=1),
    result(TWO, "mezo", 1.0, 0.8),
    result(TWO, "mezo", 1.0, 0.8, seed=1),
    result(TWO, "dizo", 0.5, 0.8),
    result(TWO, "dizo", 0.5, 0.8, seed=1),
]
RUNS = RunTable.of(RESULTS, [ONE, TWO], LABELS)


def texts(table: Table) -> list[list[str]]:
    return [[text.text for text in row] for row in table.rows]


def test_ranks_are_those_of_methods_that_ran_in_every_cell_and_the_others_stand_below():
    table = standing(RUNS, "mezo")
    rows = {row[0]: row for row in texts(table)}
    assert list(rows) == ["mezo", "dizo", "lozo"]
    assert rows["mezo"][1] == rows["dizo"][1] == "1.50"
    assert rows["dizo"][3:6] == ["1 of 2", "2 of 2", "1"]  # wins, cells, diverged
    assert rows["mezo"][3] == "-"
    assert rows["lozo"][1:5] == ["-", "-", "-", "1 of 2"]
    assert rows["mezo"][6:] == ["100", "2.0"]


def test_within_a_model_those_are_ranked_that_ran_there():
    other = Cell("large", "full", "one")
    runs = RunTable.of([*RESULTS, result(other, "mezo", 1.0), result(other, "mezo", 1.0, seed=1)], [ONE, TWO, other], LABELS)
    everything, tiny, large = standings(runs, "mezo")
    assert [table.title for table in (everything, tiny, large)] == ["All cells", "tiny, full", "large, full"]
    assert {row[0]: row[1] for row in texts(everything)} == {"mezo": "1.00", "dizo": "-", "lozo": "-"}
    assert {row[0]: row[1] for row in texts(tiny)} == {"mezo": "1.50", "dizo": "1.50", "lozo": "-"}
    assert [table.title for table in standings(RUNS, "mezo")] == ["All cells"]


def test_a_table_has_mean_and_spread_says_what_diverged_and_marks_the_best_mean():
    (loss,) = figures(RUNS, "train_loss", "loss", lowest=True)
    assert loss.columns == ["method", "one", "two"]
    assert texts(loss) == [
        ["mezo", "2.500 ± 0.707", "1.000 ± 0.000"],
        ["dizo", "1.000 (1 of 2 diverged)", "0.500 ± 0.000"],
        ["lozo", "1.500 ± 0.707", "-"],
    ]
    assert [[text.best for text in row[1:]] for row in loss.rows] == [[False, False], [False, True], [True, False]]
    (accuracy,) = figures(RUNS, "accuracy", "accuracy", lowest=False)
    assert [[text.best for text in row[1:]] for row in accuracy.rows] == [[False, True], [False, True], [True, False]]


def test_a_cell_in_which_all_diverged_has_no_best():
    lost = [result(ONE, "mezo", inf, 0.0, diverged=True)]
    runs = RunTable.of(lost, [ONE], ["mezo"])
    (table,) = figures(runs, "train_loss", "loss", lowest=True)
    assert table.rows == [[Text("mezo"), Text("diverged")]]
    assert texts(standing(runs, "mezo"))[0][5:] == ["1", "-", "-"]


def test_memory_has_what_a_method_says_and_what_was_seen():
    table = memory(RUNS, {"mezo": MethodCosts("0P", "", 0, 400), "dizo": MethodCosts("a copy", "", 200, 400)})
    assert texts(table)[:2] == [["mezo", "0P", "0.00", "1"], ["dizo", "a copy", "0.50", "1"]]
    assert texts(table)[2] == ["lozo", "-", "-", "1"]


def test_step_sizes_at_the_end_of_a_grid_are_marked():
    chosen = {
        (ONE, "mezo"): ({"lr": 1e-3}, [1e-4, 1e-3]),
        (ONE, "dizo"): ({"lr": "auto", "step_fraction": 0.2}, [0.1, 0.2, 0.3]),
    }
    found = texts(step_sizes(RunTable([ONE], LABELS, {}), chosen))
    assert [row[1] for row in found] == ["lr 0.001 *", "step_fraction 0.2", "-"]


def test_markdown_has_the_best_in_bold_and_no_text_ends_a_field():
    table = Table("t|t", ["method", "a_b"], [[Text("m|x"), Text("1 <b>", best=True)]])
    assert markdown_table(table) == "| method | a_b |\n| --- | --: |\n| m\\|x | **1 &lt;b>** |"
    assert markdown("A", ["said"], [table]).startswith("# A\n\nsaid\n\n## t\\|t\n\n| method")


RECORDS = [
    {"label": "mezo", "seed": 0, "lr": 1e-3, "step_fraction": None, "tuner": None, "reason": "a, b"},
    {"label": "learned", "seed": 1, "lr": None, "step_fraction": 0.1, "tuner": "t", "reason": ""},
]


def test_records_are_written_as_csv_and_parquet(tmp_path):
    assert [path.name for path in write_records(tmp_path, RECORDS)] == ["results.csv", "results.parquet"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(tmp_path / "results.parquet").to_pylist() == RECORDS
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["mezo", "learned"]
    assert (rows[0]["lr"], rows[0]["step_fraction"], rows[0]["reason"]) == ("0.001", "", "a, b")


def test_without_pyarrow_there_is_the_csv_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert [path.name for path in write_records(tmp_path, RECORDS)] == ["results.csv"]


def logged(folder: Path, num_directions: list[list[list[float | None]]], loss: float | None = None) -> None:
    folder.mkdir()
    steps = [{"step": k, "lr": 1.0, "passes": 2, "draws": one} for k, one in enumerate(num_directions)]
    steps = [step | ({} if loss is None else {"loss": loss}) for step in steps]
    (folder / TEXT).write_text("".join(json.dumps(line) + "\n" for line in [{"seed": 0}, *steps]))
    (folder / "metrics.csv").write_text("step,passes,seconds,dev_loss\n0,2,1.0,\n1,4,3.0,0.5\n")


def test_a_curve_takes_the_losses_that_are_there(tmp_path):
    logged(tmp_path / "two", [[[0.1, 1.0, 3.0]], [[0.1, 1.0, 2.0], [0.1, 3.0, 4.0]]])
    assert step_curve(tmp_path / "two") == [(2.0, 2.0), (4.0, 2.5)]
    logged(tmp_path / "one", [[[0.1, 1.0, None]], [[0.1, 1.0, None], [0.1, 2.0, None]]])
    assert step_curve(tmp_path / "one") == [(2.0, 1.0), (4.0, 1.5)]
    logged(tmp_path / "first-order", [[], []], loss=0.7)
    assert step_curve(tmp_path / "first-order") == [(2.0, 0.7), (4.0, 0.7)]


def test_curves_are_means_over_the_seeds_against_passes_and_against_the_mean_of_their_seconds(tmp_path):
    logged(tmp_path / "a", [[[0.1, 1.0, 1.0]], [[0.1, 2.0, 2.0]]])
    logged(tmp_path / "b", [[[0.1, 3.0, 3.0]], [[0.1, 4.0, 4.0]]])
    (tmp_path / "b" / "metrics.csv").write_text("step,passes,seconds,dev_loss\n0,2,3.0,\n1,4,5.0,0.5\n")
    folders = [tmp_path / name for name in "ab"]
    runs = [
        result(ONE, "mezo", 1.0, seed=n, passes=4, folder=str(folder), curve=step_curve(folder))
        for n, folder in enumerate(folders)
    ]
    lost = result(ONE, "dizo", inf, diverged=True, folder=str(tmp_path / "nowhere"))
    runs = RunTable.of([*runs, lost], [ONE], ["mezo", "dizo"])
    found = mean_curves(runs, ONE)
    assert found == {"passes": {"mezo": [(2.0, 2.0), (4.0, 3.0)]}, "seconds": {"mezo": [(2.0, 2.0), (4.0, 3.0)]}}
    assert clock(tmp_path / "b") == [(0.0, 0.0), (2.0, 3.0), (4.0, 5.0)]
    target = draw_curves(tmp_path / "curves.png", {"one": found["passes"]}, ["mezo", "dizo"], "forward passes")
    assert target.read_bytes().startswith(b"\x89PNG")
