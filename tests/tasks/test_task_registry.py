"""Tasks are found by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from l2l.tasks import get_task, task_names

HELPERS = {"base", "render", "rows", "hub", "encode", "losses", "closure", "generate", "metrics", "evaluate"}


def test_the_list_holds_tasks_and_no_helper_module():
    names = task_names()
    assert {"sst2", "sst5", "rte", "cb", "boolq", "copa", "trec", "ag_news", "squad"} <= set(names)
    assert {"snli", "mnli", "wic", "wsc", "multirc"} <= set(names)
    assert not HELPERS & set(names)
    assert names == sorted(names)


def test_every_listed_task_carries_its_module_s_name():
    assert [get_task(name).name for name in task_names()] == task_names()


def test_an_unknown_task_gets_a_suggestion_and_the_list():
    with pytest.raises(ValueError, match=r"unknown task 'ssst2' \(did you mean 'sst2'\?\); known tasks: ag_news"):
        get_task("ssst2")


def test_a_helper_module_is_not_a_task():
    with pytest.raises(ValueError, match="unknown task 'encode'"):
        get_task("encode")


def test_listing_tasks_imports_nothing_heavy():
    code = (
        "import sys, l2l.tasks as t; before = set(sys.modules); t.task_names();"
        "new = set(sys.modules) - before; print([m for m in new if m.split('.')[0] in ('transformers', 'datasets')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
