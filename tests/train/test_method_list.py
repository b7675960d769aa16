"""``l2l methods list``: every method, with what it costs and where it is from."""

from __future__ import annotations

from l2l.methods import method_names
from l2l.methods.registry import method_list
from l2l.methods.wrappers import wrapper_names
from l2l.train.baselines import baseline_list, baseline_names


def test_every_method_enhancement_and_baseline_has_a_row():
    names = [row["method"] for row in method_list() + baseline_list()]
    assert names == [*method_names(), *(f"{name}+…" for name in wrapper_names()), *baseline_names()]


def test_a_row_says_what_passes_memory_and_paper():
    rows = {row["method"]: row for row in method_list() + baseline_list()}
    assert all(row["what"] and row["passes"] and row["memory"] for row in rows.values())
    assert all(rows[name]["paper"] for name in method_names())
    assert (rows["mezo"]["passes"], rows["mezo"]["memory"]) == ("2", "0P")
    assert "2305.17333" in rows["mezo"]["paper"]
    assert rows["dizo"]["passes"] == "2.4"  # 2, and 20 every 50 steps
    assert rows["adamw"]["passes"] == "3"
    assert rows["learned+…"]["passes"] == "2"
