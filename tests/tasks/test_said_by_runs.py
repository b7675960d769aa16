"""Kind A10: checks live in one command only. What ``tasks check`` shows, runs say; keys that stand twice are refused.

Tried because others met them: deepseek-ai/DeepSeek-R1 #151 and abetlen/llama-cpp-python #1501 (a prompt that begins with BOS
gets a second one in silence), snowflakedb/ArcticTraining #85 and rbgirshick/yacs #17 (of two values for one key of a
configuration the last one holds in silence, ``max_length`` for example).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from daily import daily_slice

import l2l
from l2l.cli import main
from l2l.experiments.presets.compare import run_comparison
from l2l.experiments.spec import CompareConfig, Setting
from l2l.models.load import load_tokenizer
from l2l.tasks import get_task, load_splits
from l2l.tasks.inspect import CheckConfig, check, findings

pytestmark = pytest.mark.in_turn

MOODS = ["sad", "happy"]
SMALL: dict[str, Any] = {"steps": 1, "batch_size": 2, "train_size": 12, "dev_size": 4, "progress": False}


def task_file(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> str:
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | {"split": name}) + "\n" for row in rows))
    files = {"train": "train.jsonl", "validation": "validation.jsonl"}
    own = {"task": "mine", "doc_to_text": "{{ text }} she was", "doc_to_choice": MOODS, "doc_to_target": "mood"}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"data_files": files} | own | fields))
    return str(folder / "mine.yaml")


def rows(mood: Callable[[int], str] = lambda n: MOODS[n % 2], text: str = "lily had {n} dogs .") -> list[dict[str, Any]]:
    return [{"text": text.format(n=n), "mood": mood(n)} for n in range(24)]


WRONG: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "BOS twice": (rows(), {"doc_to_text": "<s>{{ text }} she was"}, "prompts begin with <s>"),
    "space twice": (rows(), {"doc_to_text": "{{ text }} she was "}, "prompts end in white space"),
    "prompts cut": (rows(text="{n} " + "a dog " * 200), {}, "rows have more than 256 tokens, up to "),
    "one label": (rows(lambda n: "sad"), {}, "' sad' is right in 100% of the train rows"),
    "never right": (rows(lambda n: "sad"), {}, "never right in train: "),
    "leak": (rows(), {}, "validation prompts also stand in train"),
}


def fine_tune(task: str, out: Path) -> None:
    l2l.fine_tune(task=task, out=str(out), test_size=4, lr=1e-4, **SMALL)


def meta_train(task: str, out: Path) -> None:
    l2l.meta_train(tasks=[task], out=str(out), validation_steps=1, **SMALL)


def compare(task: str, out: Path) -> None:
    sizes: dict[str, Any] = {"train_size": 12, "dev_size": 4, "test_size": 4, "passes": 2, "evaluations": 1, "processes": 1}
    settings = [Setting("tiny", tasks=[task], batch_size=2)]
    run_comparison(
        CompareConfig(out=str(out), settings=settings, methods=["mezo"], grid=[1e-4], seeds=1, progress=False, **sizes)
    )


SAID = [(fine_tune, wrong) for wrong in WRONG]
SAID += [(meta_train, wrong) for wrong in WRONG if wrong != "leak"]  # it reads no validation rows
SAID += [(compare, "BOS twice")]


@pytest.mark.parametrize(("run", "wrong"), daily_slice(SAID, 5, name=lambda run, wrong: f"{run.__name__}-{wrong}"))
def test_a_run_says_in_a_line_what_the_check_shows(run, wrong, tmp_path, caplog):
    data, fields, line = WRONG[wrong]
    task = task_file(tmp_path, data, **fields)
    assert any(line in warning for warning in check(CheckConfig(task=task)).warnings)
    with caplog.at_level(logging.WARNING, "l2l"):
        run(task, tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if line in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("task 'mine': ") and "\n" not in said[0]


def test_a_run_says_that_rows_are_fewer_than_asked_for_before_it_trains(tmp_path, caplog):
    fine_tune(task_file(tmp_path, rows()[:9]), tmp_path / "out")
    assert "task 'mine' has too few rows: 6 train rows instead of 12, 3 dev rows instead of 4" in caplog.text


def test_tasks_of_the_package_are_trained_in_silence(tmp_path, caplog):
    fine_tune("world_topic", tmp_path / "out")
    assert "task 'world_topic'" not in caplog.text


def test_the_findings_are_those_of_the_check(tmp_path):
    """The same function: on the rows that the check reads, its figures are the check's."""
    task = get_task(task_file(tmp_path, rows(lambda n: "sad")))
    splits = load_splits(task, None, 24, 0, 24)
    found = findings(task, splits.train, splits.test, load_tokenizer("l2l/tiny"), 256, "l2l/tiny")
    whole = check(CheckConfig(task=str(tmp_path / "mine.yaml")))
    assert (found.facts, found.options, found.warnings) == (whole.facts, whole.options, whole.warnings)


TWICE = [
    ("steps: 3\nlr: 1.0e-4\nsteps: 4\n", "'steps'", 3),
    ("method_args:\n  rank: 2\n  rank: 4\n", "'rank'", 3),
    ("steps: 3\nsettings:\n- name: a\n  tasks: [sst2]\n  name: b\n", "'name'", 5),
    ('{"steps": 3,\n "steps": 4}', "'steps'", 2),
]


@pytest.mark.parametrize(("text", "key", "line"), TWICE)
@pytest.mark.parametrize("command", ["fine-tune", "meta-train", "compare"])
def test_a_key_that_stands_twice_in_a_configuration_is_named_with_its_line(command, text, key, line, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main([command, "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"l2l: {file}:{line}: {key} stands there twice; remove one\n"


def test_a_key_that_stands_twice_in_an_option_is_named(tmp_path, capsys):
    assert main(["fine-tune", "--method_args", "{rank: 2, rank: 4}", "--out", str(tmp_path / "out")]) == 2
    assert "--method_args {rank: 2, rank: 4}: 'rank' stands there twice" in capsys.readouterr().err


def test_anchors_and_equal_keys_of_different_mappings_are_no_repetition(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method_args: &a {rank: 2}\nscheme_args: *a\nscheme: lora\n")
    with pytest.raises(SystemExit) as left:
        main(["fine-tune", "--config", str(file), "--print_config"])
    assert left.value.code == 0


def test_a_key_that_stands_twice_inside_a_task_file_or_a_row_is_named(tmp_path):
    file = Path(task_file(tmp_path, rows()))
    file.write_text(file.read_text() + "metadata:\n  version: 1\n  version: 2\n")
    last = file.read_text().count("\n")
    with pytest.raises(ValueError, match=rf"mine.yaml:{last}: field 'version' stands there twice"):
        get_task(str(file))
    file = Path(task_file(tmp_path, rows()))
    with (tmp_path / "train.jsonl").open("a") as lines:
        lines.write('{"text": "a dog", "mood": "sad", "mood": "happy"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:25: .*'mood' stands there twice"):
        load_splits(get_task(str(file)), None, 24, 0, 4)
