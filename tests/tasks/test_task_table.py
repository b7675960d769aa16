"""The table of tasks says what the tasks are and what models score, the same every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import task_table
from task_table import ABSENT, Sizes, catalogue, majority_accuracy, prompt_row, prompt_shape, row_counts, zero_shot

from l2l.tasks import get_task, task_names
from l2l.tasks.base import Example, HubData, Task
from l2l.tasks.evaluate import evaluate
from l2l.tasks.rows import TEST_SEED, load_rows


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sst2").mkdir()
    for split, count in (("train", 30), ("validation", 8)):
        rows = [{"sentence": f"film {number} .", "label": int(number % 4 == 0)} for number in range(count)]
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("name", task_names())
def test_every_task_shows_its_prompt_without_data(name):
    shape = prompt_shape(get_task(name))
    assert shape.prompt
    assert len(shape.options) >= 1


def test_the_shape_holds_the_names_of_the_fields():
    assert prompt_shape(get_task("rte")).prompt.startswith("{premise}\n")
    assert prompt_shape(get_task("copa")) == Example("{premise} because", (" {choice1}", " {choice2}"), (0,))
    assert prompt_row(get_task("sst2")) == {
        "task": "`sst2`",
        "prompt": "`{sentence} It was`",
        "options": "`␣terrible` `␣great`",
        "variants": "`empty`: `{sentence}`",
        "context-less prompt": "`It was`",
    }


def test_a_task_whose_field_needs_a_value_of_its_own_kind_says_so():
    task = Task("mine", HubData("me/mine"), ("n",), lambda row: Example("a", (f" {int(row['n'])}",)))
    with pytest.raises(ValueError, match="the row that shows the prompt: task 'mine' cannot render this row"):
        prompt_shape(task)


def test_counts_are_those_of_the_files_and_of_the_usual_run(folder):
    assert row_counts(get_task("sst2"), folder) == Sizes(30, 8, (20, 10, 8))
    assert row_counts(get_task("rte"), folder) is None
    assert row_counts(get_task("sst2"), None) is None
    assert row_counts(get_task("world_topic"), folder) is None
    assert majority_accuracy(get_task("sst2"), folder) == 0.75


def test_the_table_repeats_itself_and_says_where_data_are_absent(folder, stories):
    names = ["sst2", "rte", "world_cause", "winogrande"]
    first, second = (catalogue(folder, {"small": stories}, 10, names) for _ in range(2))
    assert first == second
    lines = {line.split("|")[1].strip(): line for line in first.split("## Prompts")[0].splitlines() if "@" in line}
    assert list(lines) == [f"`{name}@1`" for name in names]
    assert "| 30 / 8 | 20 / 10 / 8 | 0.750 |" in lines["`sst2@1`"]
    assert lines["`rte@1`"].count(ABSENT) == 3
    assert "| generated | as asked | - |" in lines["`world_cause@1`"]
    rows = load_rows(get_task("world_cause"), "validation", None, 10, TEST_SEED)
    model, tokenizer = stories
    scores = evaluate(model, tokenizer, get_task("world_cause"), rows)
    low, high = scores.interval
    assert f"| {scores.value:.3f} [{low:.3f}, {high:.3f}] |" in lines["`world_cause@1`"]


def test_official_metrics_stand_in_brackets(shared, stories):
    text = catalogue(shared / "data", {"small": stories}, 6, ["multirc"])
    scores = zero_shot(get_task("multirc"), shared / "data", *stories, rows=6)
    assert scores is not None
    f1a, exact = scores.official["f1a"], scores.official["exact_match"]
    assert f"| {scores.value:.3f} [" in text
    assert f"] (f1a {f1a:.3f}, exact_match {exact:.3f})" in text


def test_nothing_is_fetched_where_no_directory_is_given(stories, monkeypatch):
    monkeypatch.setattr("l2l.tasks.rows.hub_rows", lambda *_: pytest.fail("asked the hub"))
    assert ABSENT in catalogue(None, {"small": stories}, 5, ["sst2"])


def test_the_committed_file_names_every_task_with_its_version_and_prompt():
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task in map(get_task, task_names()):
        assert f"| `{task.label}` |" in text
        assert prompt_row(task)["prompt"] in text


def test_the_script_writes_the_file_as_a_whole_and_names_its_command(tmp_path, monkeypatch):
    out = tmp_path / "tasks.md"
    options = ["--rows", "5", "--tasks", "world_topic", "sst2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/task_table.py", *options])
    task_table.main()
    text = out.read_text(encoding="utf-8")
    assert "`python benchmarks/task_table.py --data_dir DATA --models l2l/tiny --rows 5 --out" in text
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["world_topic@1", "sst2@1", "world_topic", "sst2"]
    assert lines[0].startswith("| `world_topic@1` | options | accuracy | generated | as asked | ")
    assert lines[1].count("no data here") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.md"]
