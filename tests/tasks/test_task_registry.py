"""Tasks are found by name; version and variant are parts of a name; adding a task is adding one file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from l2l.tasks import get_task, hub, registry, task_names
from l2l.tasks.registry import TaskName, parse_name

MINE = """
from l2l.tasks.base import Example, HubData, Row, Task, text_of


def _example(row: Row) -> Example:
    return Example(f"{text_of(row, 'text')} It was", (" bad", " good"), (row["label"],))


TASK = Task(name="mine", source=HubData("me/mine"), fields=("text", "label"), example=_example)
"""


def test_the_list_is_sorted_and_holds_the_tasks_of_all_definitions():
    names = task_names()
    assert {"sst2", "rte", "boolq", "copa", "squad", "world_topic"} <= set(names)
    assert names == sorted(names)
    assert [get_task(name).name for name in names] == names


@pytest.fixture
def add_task(tmp_path, monkeypatch):
    """Put a module among the definitions; afterwards it is gone."""

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setattr(hub, "__path__", [*hub.__path__, str(tmp_path)])
        registry._tasks.cache_clear()

    yield add
    monkeypatch.undo()
    registry._tasks.cache_clear()
    for module in ("l2l.tasks.hub.mine", "l2l.tasks.hub.again"):
        sys.modules.pop(module, None)


def test_a_module_among_the_definitions_is_a_task_and_nothing_else_has_to_change(add_task):
    add_task("mine", MINE)
    assert "mine" in task_names()
    assert get_task("mine@1").example({"text": "fine .", "label": 1}).prompt == "fine . It was"


def test_two_tasks_of_one_name_are_refused(add_task):
    add_task("again", MINE.replace('name="mine"', 'name="sst2"'))
    with pytest.raises(ValueError, match="defines a second task 'sst2'; give it another name"):
        task_names()


def test_an_unknown_task_gets_a_suggestion_and_the_list():
    with pytest.raises(ValueError, match=r"unknown task 'ssst2' \(did you mean 'sst2'\?\); known tasks: ag_news"):
        get_task("ssst2")


def test_a_module_of_the_package_is_not_a_task():
    for name in ("encode", "nli", "scenes"):
        with pytest.raises(ValueError, match=f"unknown task '{name}'"):
            get_task(name)


def test_another_process_gives_the_same_generated_rows_and_lists_tasks_without_heavy_imports():
    code = (
        "import sys, l2l.tasks as t; before = set(sys.modules); t.task_names();"
        "new = set(sys.modules) - before; print([m for m in new if m.split('.')[0] in ('transformers', 'datasets')]);"
        "print(t.get_task('world_cause').source.generate('train', 20, 5))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    heavy, rows = done.stdout.splitlines()
    assert heavy == "[]"
    assert rows == str(get_task("world_cause").source.generate("train", 20, 5))  # pyright: ignore


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sst2", TaskName("sst2")),
        ("sst2@1", TaskName("sst2", 1)),
        ("sst2:empty", TaskName("sst2", None, "empty")),
        ("sst2@1:empty", TaskName("sst2", 1, "empty")),
        ("sst2:empty@1", TaskName("sst2", 1, "empty")),
    ],
)
def test_a_name_holds_version_and_variant(text, expected):
    assert parse_name(text) == expected


@pytest.mark.parametrize("text", ["", "@1", ":empty", "sst2:", "sst2:a:b", "sst2@1@1", "sst2@1:empty@1"])
def test_a_name_of_another_form_is_an_error_that_shows_the_form(text):
    with pytest.raises(ValueError, match=r"a task is named as in 'sst2', 'sst2@1', 'sst2:empty' or 'sst2@1:empty'"):
        get_task(text)


@pytest.mark.parametrize("text", ["sst2@one", "sst2@", "sst2@-1", "sst2@²"])
def test_a_version_is_a_whole_number(text):
    with pytest.raises(ValueError, match="the version must be a whole number, as in 'sst2@1'"):
        get_task(text)


def test_the_current_version_is_accepted_and_another_is_refused_with_both():
    assert get_task("sst2@1") is get_task("sst2")
    with pytest.raises(ValueError, match=r"'sst2' has version 1 here, not 2.*ask for 'sst2@1'.*has 'sst2@2'"):
        get_task("sst2@2")


def test_a_variant_that_is_not_there_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'sst2' has no variant 'full'; it has 'sst2:empty'$"):
        get_task("sst2:full")
    with pytest.raises(ValueError, match=r"'squad' has no variant 'empty'; it has none$"):
        get_task("squad:empty")


def test_an_unknown_task_with_a_version_still_gets_its_suggestion():
    with pytest.raises(ValueError, match=r"unknown task 'ssst2' \(did you mean 'sst2'\?\)"):
        get_task("ssst2@1:empty")
