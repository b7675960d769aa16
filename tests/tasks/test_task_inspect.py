"""What ``tasks list``, ``show`` and ``check`` tell, and the example of the document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from l2l import fine_tune
from l2l.tasks import get_task, task_names
from l2l.tasks.base import FileData
from l2l.tasks.inspect import CheckConfig, Checked, card, check, table_row

DOCUMENT = Path(__file__).parents[2] / "docs" / "your-task.md"
CHOICE = {
    "task": "mine",
    "doc_to_text": "{{ text }} she was",
    "doc_to_choice": ["sad", "happy"],
    "doc_to_target": "mood",
}


def written(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], **fields: Any) -> str:
    for name, rows in (("train", train), ("validation", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "train.jsonl", "validation": "validation.jsonl"}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"data_files": files} | CHOICE | fields))
    return str(folder / "mine.yaml")


def checked(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], **fields: Any) -> Checked:
    return check(CheckConfig(task=written(folder, train, test, **fields)))


def rows(*moods: str) -> list[dict[str, str]]:
    return [{"text": f"lily had a {thing} .", "mood": mood} for thing, mood in zip(["ball", "dog", "hat"], moods, strict=False)]


def test_the_list_tells_of_every_task_what_is_asked_and_where_its_rows_come_from():
    lines = {line["task"]: line for line in (table_row(get_task(name)) for name in task_names())}
    assert lines["sst2@1"] | {"variants": ""} == {
        "task": "sst2@1",
        "kind": "choose",
        "options": "terrible/great",
        "loss": "classification",
        "metric": "accuracy",
        "source": "stanfordnlp/sst2",
        "variants": "",
    }
    assert lines["squad@1"]["kind"] == "generate"
    assert lines["world_where@1"]["source"] == "generated"
    assert not [name for name, line in lines.items() if line["options"] == "?"]


def test_the_card_shows_prompt_options_and_splits(tmp_path):
    assert "prompt    {premise} because" in card(get_task("copa"))
    mine = card(get_task(written(tmp_path, rows("sad"), rows("happy"))))
    assert "prompt    lily had a ball . she was\noptions   ' sad' | ' happy'" in mine
    assert f"reported on: {tmp_path / 'validation.jsonl'}" in mine


def test_a_check_shows_tokens_ids_balance_and_the_right_option(tmp_path):
    found = checked(tmp_path, rows("sad", "sad", "happy"), rows("happy"))
    by_option = {line["option"]: line for line in found.options}
    assert list(by_option) == ["␣sad", "␣happy"]
    assert (by_option["␣sad"]["right in train"], by_option["␣sad"]["right in validation"]) == (2, 0)
    assert len(found.examples) == 3
    right = next(line for line in "\n".join(found.examples).splitlines() if "* sad" in line)
    assert right == f"  ‖ * sad  [{by_option['␣sad']['ids']}]"
    assert any(example.splitlines()[1].endswith("·.·she·was") for example in found.examples)
    assert (found.facts["train rows"], found.facts["validation rows"], found.facts["rows cut"]) == (3, 1, 0)
    assert found.facts["always the commonest"] == 1.0


def test_a_check_warns_of_rows_that_stand_in_both_splits_and_of_an_option_that_is_never_right(tmp_path):
    found = checked(tmp_path, rows("sad", "sad"), rows("sad", "sad"))
    assert found.facts["validation prompts in train"] == 2
    assert "2 validation prompts also stand in train: figures flatter" in found.warnings
    assert "never right in train: ␣happy" in found.warnings


def test_a_check_warns_of_options_of_several_tokens_and_of_those_that_no_model_can_tell_apart(tmp_path):
    found = checked(tmp_path, rows("0", "1"), rows("0"), doc_to_choice=["xylophone", "sad", "Sad"])
    assert any(warning.startswith("options of several tokens for l2l/tiny: ␣xylophone;") for warning in found.warnings)
    assert any("␣sad and ␣Sad have the same tokens for l2l/tiny" in warning for warning in found.warnings)


def test_a_check_counts_rows_that_are_cut_and_sees_white_space_doubled(tmp_path):
    long = [{"text": "a dog " * 200, "mood": "sad"}, *rows("happy")]
    found = checked(tmp_path, long, rows("sad"), doc_to_text="{{ text }} she was ")
    assert found.facts["rows cut"] == 1
    assert "1 rows have more than 256 tokens, up to 404, and lose their beginning" in found.warnings
    assert any(warning.startswith("3 prompts end in white space") for warning in found.warnings)
    assert "… 343 tokens …" in "\n".join(found.examples)


def test_a_check_of_generated_answers_counts_them(tmp_path):
    fields = {"output_type": "generate_until", "doc_to_choice": None}
    found = checked(tmp_path, rows("sad", "happy"), rows("sad"), **fields)
    assert found.facts["different answers in train"] == 2
    assert found.options == []


def test_a_check_reads_any_task_and_model_as_a_run_would(shared):
    config = CheckConfig("copa", str(shared / "models" / "stories260K"), str(shared / "data"), rows=20, examples=1)
    found = check(config)
    assert (found.facts["task"], found.facts["train rows"], found.facts["tokens that fit"]) == ("copa@1", 20, 512)
    assert found.options == []  # each row has its own
    assert found.examples[0].count("‖") == 2


def test_what_a_check_cannot_do_is_one_line():
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        CheckConfig(examples=0)
    with pytest.raises(ValueError, match=r"max_length 9999 must lie in 2\.\.256, the positions of 'l2l/tiny'"):
        check(CheckConfig(max_length=9999))


def test_the_example_of_the_document_runs(tmp_path, monkeypatch):
    text = DOCUMENT.read_text()
    data, task = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("csv", "yaml"))
    assert data and task
    (tmp_path / "moods.csv").write_text(data[1])
    (tmp_path / "moods.yaml").write_text(task[1])
    monkeypatch.chdir(tmp_path)
    found = check(CheckConfig(task="moods.yaml"))
    assert found.facts["held out"].endswith("a fixed 1 in 5 of its train rows is held out as such")
    assert not [warning for warning in found.warnings if "several tokens" in warning or "does not know" in warning]
    assert isinstance(get_task("moods.yaml").source, FileData)
    result = fine_tune("l2l/tiny", "moods.yaml", steps=3, lr=1e-4, out="run", progress=False)
    assert result.summary["task"] == "moods@1"
    assert result.summary["rows"] == {"train": 7, "dev": 3, "test": 2}
    assert "has no validation data" in result.summary["note"]
