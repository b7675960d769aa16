"""A task without code: a YAML file beside its data; a wrong file gives one error, which names file, field and the way out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from l2l import fine_tune
from l2l.cli import main
from l2l.tasks import get_task
from l2l.tasks.base import Example, FileData, HubData
from l2l.tasks.rows import load_rows, load_splits, part_of
from l2l.train.evaluate import EvaluateConfig
from l2l.train.evaluate import run_evaluation as evaluate

CHOICE = {
    "task": "mine",
    "doc_to_text": "{{ text }} she was",
    "doc_to_choice": ["sad", "happy"],
    "doc_to_target": "mood",
}
THINGS = ("ball", "hat", "dog", "cake", "cat", "book", "box", "car")


def moods(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that differ, half of them sad."""
    texts = [f"lily {'lost' if n % 2 else 'found'} the {THINGS[n // 2 % 8]} and the {THINGS[n // 16 % 8]} ." for n in range(99)]
    return [{"text": texts[start + n], "mood": ("happy", "sad")[(start + n) % 2]} for n in range(count)]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(folder: Path, **fields: Any) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


def example(folder: Path, row: dict[str, Any], **fields: Any) -> Example:
    """One row, rendered by a task of these fields."""
    write_jsonl(folder / "rows.jsonl", [row])
    task = get_task(written(folder, **({"task": "mine", "data_files": "rows.jsonl"} | fields)))
    return task.example(row)


def test_a_task_of_a_yaml_and_csv_files_trains_and_evaluates(tmp_path):
    write_csv(tmp_path / "train.csv", moods(60))
    write_csv(tmp_path / "test.csv", moods(20, 60))
    path = written(tmp_path, **CHOICE, data_files={"train": "train.csv", "validation": "test.csv"}, metadata={"version": 3})
    result = fine_tune(
        "l2l/tiny", path, steps=3, lr=1e-3, batch_size=4, train_size=40, dev_size=8, test_size=20,
        out=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    assert result.summary["task"] == "mine@3"
    assert result.summary["rows"] == {"train": 40, "dev": 8, "test": 20}
    found = evaluate(EvaluateConfig(model=str(tmp_path / "run" / "model"), task=path, progress=False))
    assert found["loss"] == pytest.approx(result.summary["best"]["test"]["loss"], rel=1e-5)
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = [{"text": 'a "b", c\nd é', "mood": "sad"}, *moods(3)]
    path = tmp_path / f"all{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        write_csv(path, rows, "\t" if suffix == ".tsv" else ",")
    task = get_task(written(tmp_path, **CHOICE, data_files={"train": path.name, "validation": path.name}))
    assert sorted(row["text"] for row in load_rows(task, "train", None)) == sorted(row["text"] for row in rows)


def test_a_csv_with_a_byte_order_mark_reads_as_one_without(tmp_path):
    (tmp_path / "all.csv").write_text("text,mood\nhello,sad\n", encoding="utf-8-sig")
    task = get_task(written(tmp_path, **CHOICE, data_files={"train": "all.csv", "validation": "all.csv"}))
    assert load_rows(task, "train", None) == [{"text": "hello", "mood": "sad"}]


def test_of_a_single_file_a_fixed_share_is_held_out_and_the_note_says_so(tmp_path):
    write_csv(tmp_path / "all.csv", moods(50))
    task = get_task(written(tmp_path, **CHOICE, data_files="all.csv"))
    first, second = (load_splits(task, None, 30, 10, 100, seed) for seed in (0, 1))
    assert (len(first.train), len(first.dev), len(first.test)) == (30, 10, 10)
    assert first.test == second.test and first.train != second.train
    assert not {row["text"] for row in first.test} & {row["text"] for row in (*first.train, *first.dev)}
    assert first.note.startswith("task 'mine' has no validation data: a fixed 1 in 5 of its train rows is held out")
    assert "10 test rows instead of 100" in first.note


def test_the_held_out_part_depends_on_the_number_of_rows_alone():
    train, validation = part_of(10, "train"), part_of(10, "validation")
    assert sorted(train + validation) == list(range(10))
    assert len(validation) == 2
    assert part_of(2, "validation") + part_of(2, "train") in ([0, 1], [1, 0])


@pytest.mark.parametrize("target", [1, "1", "good", " good ", True, 1.0])
def test_a_target_is_an_index_or_a_choice_s_text(tmp_path, target):
    row = {"text": "fine", "label": target}
    found = example(tmp_path, row, doc_to_text="text", doc_to_choice=["bad", "good"], doc_to_target="label")
    assert found == Example("fine", (" bad", " good"), (1,))


def test_digits_that_are_a_choice_mean_that_choice(tmp_path):
    found = example(tmp_path, {"t": "x", "stars": "2"}, doc_to_text="t", doc_to_choice=list("123"), doc_to_target="stars")
    assert found.gold == (1,)


def test_choices_may_come_from_a_list_column_or_a_template(tmp_path):
    row = {"q": "why", "all": ["so", 'it\'s "so"'], "one": "so", "two": 'it\'s "so"', "right": [1, 0]}
    by_column = example(tmp_path, row, doc_to_text="q", doc_to_choice="all", doc_to_target="right")
    by_template = example(tmp_path, row, doc_to_text="q", doc_to_choice="{{ [one, two] }}", doc_to_target="{{ right }}")
    by_each = example(tmp_path, row, doc_to_text="q", doc_to_choice=["{{ one }}", "{{ two }}"], doc_to_target="right")
    assert by_column == by_template == by_each == Example("why", (" so", ' it\'s "so"'), (1, 0))


def test_a_generated_answer_ends_its_line_and_keeps_all_references(tmp_path):
    row = {"q": "Where?", "a": {"text": ["Rome", "in Rome"]}}
    fields = {"output_type": "generate_until", "doc_to_text": "Q: {{ q }}\nA:", "doc_to_target": "{{ a.text }}"}
    assert example(tmp_path, row, **fields) == Example("Q: Where?\nA:", (" Rome\n",), (0,), ("Rome", "in Rome"))
    task = get_task(str(tmp_path / "mine.yaml"))
    assert (task.form, task.metric) == ("lm", "f1")


def test_delimiter_and_last_newline_stay_as_they_are_written(tmp_path):
    fields = {"doc_to_text": "{{ text }}\n", "doc_to_choice": ["No", "Yes"], "doc_to_target": 1, "target_delimiter": ""}
    assert example(tmp_path, {"text": "so?"}, **fields) == Example("so?\n", ("No", "Yes"), (1,))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ text.nothing }}", "has no attribute 'nothing'"),
        ("{{ other }}", "a value that the template prints is null"),
        ("{{ 1 / 0 }}{{ text }}", "the template fails on this row: division by zero"),
        ("{{ text[9:] }}", "the prompt is blank in this row"),
    ],
)
def test_a_template_that_fails_on_a_row_says_why_and_never_reaches_python(tmp_path, template, message):
    with pytest.raises(ValueError, match=message) as caught:
        example(tmp_path, {"text": "x", "other": None}, **(CHOICE | {"doc_to_text": template, "doc_to_target": 0}))
    assert "mine.yaml: field 'doc_to_text'" in str(caught.value)


def test_lm_evaluation_harness_names_give_the_same_source(tmp_path):
    hub = get_task(
        written(tmp_path, **CHOICE, dataset_path="me/moods", dataset_name="plain", dataset_kwargs={"revision": "v2"},
                training_split="train", validation_split="test", metric_list=[{"metric": "acc"}])
    )  # fmt: skip
    assert hub.source == HubData("me/moods", "plain", ("train", "test"), "v2")
    write_jsonl(tmp_path / "rows.jsonl", moods(2))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "rows.jsonl"}}}
    assert get_task(written(tmp_path, **CHOICE, **files)).source == FileData((tmp_path / "rows.jsonl",))


def test_one_split_of_a_hub_data_set_is_divided_too(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(moods(10)))
    task = get_task(written(tmp_path, **CHOICE, dataset_path="me/moods"))
    train, test = (load_rows(task, split, None) for split in ("train", "validation"))
    assert sorted(row["text"] for row in (*train, *test)) == sorted(row["text"] for row in moods(10))
    assert (len(train), len(test)) == (8, 2)


def test_a_column_that_a_hub_data_set_lacks_is_named_with_the_row_and_the_columns_there_are(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(moods(3)))
    task = get_task(written(tmp_path, **(CHOICE | {"doc_to_target": "label"}), dataset_path="me/moods"))
    message = r"me/moods train row 0: .*mine\.yaml: field 'doc_to_target': no column 'label'; the row has text, mood"
    with pytest.raises(ValueError, match=message):
        load_rows(task, "train", None)


def test_a_column_that_only_some_lines_of_json_have_may_be_asked_for(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", [{"text": "a", "mood": "sad"}, {"text": "b", "mood": "sad", "note": "(so)"}])
    template = "{{ text }}{% if note is defined %} {{ note }}{% endif %}"
    task = get_task(written(tmp_path, **(CHOICE | {"doc_to_text": template}), data_files="all.jsonl"))
    rows = [row for split in ("train", "validation") for row in load_rows(task, split, None)]
    assert sorted(task.example(row).prompt for row in rows) == ["a", "b (so)"]


GOOD: dict[str, Any] = {
    "task": "reviews",
    "data_files": {"train": "train.csv", "validation": "test.csv"},
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }} It was",
    "doc_to_choice": ["bad", "good"],
    "doc_to_target": "label",
    "metadata": {"version": 1},
}
ABSENT = "(left out)"

FIELDS = [
    ({"doc_to_txt": "text"}, "field 'doc_to_txt' is unknown; did you mean 'doc_to_text'?"),
    ({"colour": 1}, "field 'colour' is unknown; the fields are task, dataset_path,"),
    ({"process_docs": "x"}, "field 'process_docs' is not used here; no Python is run"),
    ({"description": "x"}, "field 'description' is not used here; put its text at the head of doc_to_text"),
    ({"task": ABSENT}, "field 'task' is missing; give a name"),
    ({"task": "sst2"}, "field 'task': 'sst2' is a task of the package; give yours another name"),
    ({"task": "a b"}, "field 'task': 'a b' is no name; use letters"),
    (
        {"doc_to_text": ABSENT},
        "field 'doc_to_text' is missing; give the prompt, as in doc_to_text: '{{ text }} It was'",
    ),
    (
        {"doc_to_text": "{{ txt }} It was"},
        "field 'doc_to_text': there is no column 'txt'; {}/train.csv has text, label; did",
    ),
    (
        {"doc_to_text": "tweet"},
        "field 'doc_to_text': there is no column 'tweet'; {}/train.csv has text, label; did",
    ),
    ({"doc_to_text": "{{ text It was"}, "field 'doc_to_text': template syntax, line 1 of the text: expected token"),
    ({"doc_to_text": "a\n{% if text %}b"}, "field 'doc_to_text': template syntax, line 2 of the text: Unexpected end"),
    ({"doc_to_text": 3}, "field 'doc_to_text': 3 is neither a column's name nor a template"),
    ({"doc_to_target": ABSENT}, "field 'doc_to_target' is missing; give the right answer"),
    ({"doc_to_target": 2}, "field 'doc_to_target': index 2 is out of range: the 2 choices count from 0 to 1"),
    ({"doc_to_target": "{{ lable }}"}, "field 'doc_to_target': there is no column 'lable'"),
    ({"doc_to_choice": ABSENT}, "field 'doc_to_choice' is missing; list the choices"),
    ({"doc_to_choice": []}, "field 'doc_to_choice': 0 choices in []; give two or more"),
    ({"doc_to_choice": ["good"]}, "field 'doc_to_choice': 1 choices in ['good']; give two or more"),
    ({"doc_to_choice": ["good", "good"]}, "field 'doc_to_choice': the choice 'good' stands there twice"),
    ({"doc_to_choice": ["good", " "]}, "field 'doc_to_choice': the choice ' ' is blank"),
    ({"doc_to_choice": [True, False]}, "field 'doc_to_choice': the choice True is no text; YAML reads yes, no"),
    ({"doc_to_choice": [0, 1]}, "field 'doc_to_choice': the choice 0 is no text; put it in quotes"),
    ({"data_files": "none.csv"}, "field 'data_files': no file '{}/none.csv'; paths are relative to the task file"),
    ({"data_files": "notes.txt"}, "field 'data_files': {}/notes.txt: cannot read .txt files; use .jsonl, .csv"),
    ({"data_files": "empty.jsonl"}, "field 'data_files': {}/empty.jsonl: holds no row"),
    ({"data_files": ABSENT}, "field 'data_files' is missing; name your files"),
    (
        {"data_files": {"test": "test.csv"}},
        "field 'data_files': has no split 'train' but test; add it, or name training_",
    ),
    ({"validation_split": "dev"}, "field 'data_files': has no split 'dev' but train, validation"),
    ({"training_split": "validation"}, "field 'data_files': split 'train' is not used; name it as training_split"),
    ({"dataset_path": "me/reviews"}, "field 'data_files' stands beside dataset_path 'me/reviews'; remove one"),
    ({"dataset_kwargs": {"trust_remote_code": True}}, "field 'dataset_kwargs': 'trust_remote_code' is not supported"),
    (
        {"output_type": "loglikelihood"},
        "field 'output_type': 'loglikelihood' is not supported; use multiple_choice or ge",
    ),
    ({"output_type": "generate_until"}, "field 'doc_to_choice' has no use where answers are generated; remove it"),
    ({"metric_list": [{"metric": "bleu"}]}, "field 'metric_list': metric 'bleu' is not known for output_type multiple"),
    ({"metric_list": []}, "field 'metric_list': [] must list one metric; use [acc]"),
    ({"metric_list": [["acc"]]}, "field 'metric_list': metric ['acc'] is not known"),
    ({"output_type": ["multiple_choice"]}, "field 'output_type': ['multiple_choice'] is not supported"),
    ({"metadata": {"version": float("inf")}}, "field 'metadata': the version is inf; give a whole number"),
    ({"form": "hinge"}, "field 'form': 'hinge' is no form of loss; use classification or lm"),
    ({"target_delimiter": 1}, "field 'target_delimiter': 1 is no text"),
    ({"metadata": {"version": "one"}}, "field 'metadata': the version is 'one'; give a whole number"),
    ({"metadata": {"version": 1.5}}, "field 'metadata': the version is 1.5; give a whole number"),
]

TEXTS = [
    ("task: a\ndoc_to_text: 'x", ":2: not YAML: found unexpected end of stream; check quotes"),
    ("task: a\n  doc: b", ":2: not YAML: mapping values are not allowed here; check quotes, colons"),
    (
        "task: a\ndoc_to_text: {{ text }}\n",
        ":2: not YAML: found unhashable key; put templates in quotes, as in doc_to_text",
    ),
    (
        "task: a\ndoc_to_text: {{ text }} It was\nb: c\n",
        ":2: not YAML: expected <block end>, but found '<scalar>'; put te",
    ),
    ("task: a\ntask: b", ":2: field 'task' stands there twice; remove one"),
    (
        "task: a\ndoc_to_text: !function utils.text",
        ":2: the tag '!function' of field 'doc_to_text' asks for code, and a task file is never run",
    ),
    ("task: !!python/object/apply:os.system ['true']", ":1: the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("- a\n- b", ": must hold fields such as 'task: name', not list"),
    ("", ": must hold fields such as 'task: name', not NoneType"),
]

ROWS = [
    (
        "text,label\nfine,2\n",
        "train.csv:2: .* field 'doc_to_target': index 2 is out of range: the 2 choices count from 0 to 1",
    ),
    ("text,label\nfine,god\n", r"train.csv:2: .* 'god' is none of the choices 'bad', 'good' \(did you mean 'good'\?\)"),
    ("text,label\nfine,-1\n", "train.csv:2: .* field 'doc_to_target': '-1' is none of the choices"),
    (
        "text,label\nfine\n",
        "train.csv:2: 1 cells, but the first line names 2 columns; put texts that hold the separator",
    ),
    ('text,label\nfine,good\n"open,1\n', "train.csv:3: not CSV in UTF-8: unexpected end of data"),
    ("text,text,label\na,b,1\n", "train.csv:1: two columns are named 'text'"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\nfine,good\npoor,bad\n")
    (tmp_path / "notes.txt").write_text("fine\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    return tmp_path


def write_good(folder: Path, change: dict[str, Any]) -> Path:
    file = folder / "my.yaml"
    fields = {name: value for name, value in (GOOD | change).items() if value is not ABSENT}
    file.write_text(yaml.safe_dump(fields))
    return file


@pytest.mark.parametrize(("change", "message"), FIELDS, ids=lambda value: str(value)[:50])
def test_a_wrong_field_is_named_with_the_file_and_the_way_out(folder, change, message):
    file = write_good(folder, change)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        get_task(str(file))
    assert str(caught.value).startswith(f"{file}: {message.replace('{}/', f'{folder}/')}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=lambda value: str(value)[:40])
def test_what_is_not_a_mapping_in_yaml_is_refused_with_its_line(folder, text, message):
    file = folder / "my.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        get_task(str(file))
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), ROWS, ids=lambda value: str(value)[:40])
def test_a_wrong_row_is_named_by_file_and_line(folder, content, message):
    (folder / "train.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(get_task(str(write_good(folder, {}))), "train", None)
    assert "\n" not in str(caught.value)


def test_the_task_file_that_is_good_is_taken(folder):
    rows = load_rows(get_task(str(write_good(folder, {}))), "train", None)
    assert {row["label"] for row in rows} == {"good", "bad"}


def test_an_absent_task_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no task file 'none\.yaml'; give the path of a YAML file, or the name"):
        get_task("none.yaml")


def test_the_command_line_says_it_in_one_line_and_exits_with_2(folder, capsys):
    file = write_good(folder, {"doc_to_txt": "text"})
    assert main(["fine-tune", "--task", str(file), "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "field 'doc_to_txt' is unknown; did you mean 'doc_to_text'?" in error
    assert not (folder / "out").exists()
