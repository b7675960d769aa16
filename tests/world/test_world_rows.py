"""The world's tasks generate their rows purely, balanced, and never share a text between splits."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter

import pytest

from l2l.world import HELD_OUT, POOL, VALIDATION
from l2l.world.rows import rows

NAMES = POOL + VALIDATION + HELD_OUT


def _task(name):
    return importlib.import_module(f"l2l.tasks.{name}").TASK


def test_the_three_groups_of_tasks_are_disjoint_and_large_enough():
    assert len(set(NAMES)) == len(NAMES) >= 10
    assert len(POOL) >= 5 and len(HELD_OUT) >= 3 and 1 <= len(VALIDATION) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_rows_carry_the_declared_fields_and_render(name):
    task = _task(name)
    assert task.name == name
    for row in task.source.generate("train", 40, 3):
        assert set(task.fields) <= set(row)
        example = task.example(row)
        assert example.gold == (row["label"],) and len(example.options) >= 2
        assert all(option.startswith(" ") for option in example.options) and not example.prompt.endswith(" ")
        assert len(set(example.options)) == len(example.options)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_rows_and_another_seed_gives_others(name):
    generate = _task(name).source.generate
    assert generate("train", 60, 1) == generate("train", 60, 1)
    assert generate("train", 60, 1) != generate("train", 60, 2)
    assert generate("train", 60, 1)[:30] == generate("train", 30, 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_in_both_splits(name):
    generate = _task(name).source.generate
    train = {row["text"] for row in generate("train", 600, 0)}
    assert not train & {row["text"] for row in generate("validation", 300, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_balanced(name):
    found = Counter(row["label"] for row in _task(name).source.generate("validation", 240, 0))
    assert max(found.values()) - min(found.values()) <= 1


def test_rows_do_not_depend_on_the_hash_seed_of_the_process():
    code = "from l2l.tasks.world_cause import TASK; print(TASK.source.generate('train', 20, 5))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert done.stdout.strip() == str(_task("world_cause").source.generate("train", 20, 5)), done.stderr


def test_an_unknown_split_is_named_in_the_error():
    with pytest.raises(ValueError, match="'test'"):
        rows("any", "test", 1, 0, 2, lambda rng, label: {"text": "", "label": label})  # pyright: ignore
