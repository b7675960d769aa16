"""Loading and sampling rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l2l.tasks import get_task
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tasks.rows import load_rows, load_splits

SST2 = get_task("sst2")


def write(folder: Path, split: str, lines: list[str]) -> Path:
    path = folder / "sst2" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sst2_lines(count: int, word: str = "film") -> list[str]:
    return [json.dumps({"sentence": f"{word} {number}", "label": number % 2}) for number in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, "train", sst2_lines(90))
    write(tmp_path, "validation", sst2_lines(20, "test"))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'sentence': 1}", "not JSON"),
        ("[1, 2]", "a row must be a JSON object, not list"),
        ('{"sentence": "x"}', "field 'label' is missing"),
        ('{"sentence": null, "label": 0}', "field 'sentence' is null"),
        ('{"sentence": "x", "label": 2}', r"field 'label' must be a whole number in 0\.\.1, not 2"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path, "train", [*sst2_lines(2), "", line, *sst2_lines(2)])
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(SST2, "train", tmp_path)
    assert str(caught.value).startswith(f"{path}:4: ")
    assert "\n" not in str(caught.value)


def test_a_line_that_is_not_utf8_names_file_and_line(tmp_path):
    path = write(tmp_path, "train", sst2_lines(1))
    path.write_bytes(path.read_bytes() + b'{"sentence": "caf\xe9", "label": 0}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:2: not JSON"):
        load_rows(SST2, "train", tmp_path)


def test_a_missing_file_says_which_and_what_to_put_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sst2/train\.jsonl'; put one JSON object per line .*sentence, label"):
        load_rows(SST2, "train", tmp_path)


def test_the_seed_fixes_the_order_and_count_cuts_it(data):
    every = load_rows(SST2, "train", data, seed=3)
    assert every == load_rows(SST2, "train", data, seed=3)
    assert every != load_rows(SST2, "train", data, seed=4)
    assert load_rows(SST2, "train", data, 10, seed=3) == every[:10]
    assert sorted(row["sentence"] for row in every) == sorted(f"film {number}" for number in range(90))


def test_train_and_dev_do_not_overlap_and_test_comes_from_validation(data):
    splits = load_splits(SST2, data, train=50, dev=30, test=10, seed=1)
    assert (len(splits.train), len(splits.dev), len(splits.test), splits.note) == (50, 30, 10, "")
    assert not {row["sentence"] for row in splits.train} & {row["sentence"] for row in splits.dev}
    assert all(row["sentence"].startswith("test") for row in splits.test)


def test_test_rows_do_not_depend_on_the_seed(data):
    first, second = (load_splits(SST2, data, 5, 5, 10, seed) for seed in (1, 2))
    assert first.test == second.test
    assert first.train != second.train


def test_with_too_few_rows_dev_gets_a_third_at_most_and_the_note_says_so(data):
    splits = load_splits(SST2, data, train=1000, dev=500, test=20)
    assert (len(splits.train), len(splits.dev)) == (60, 30)
    assert splits.note == "task 'sst2' has too few rows: 60 train rows instead of 1000, 30 dev rows instead of 500"
    small_dev = load_splits(SST2, data, train=1000, dev=5, test=20)
    assert (len(small_dev.train), len(small_dev.dev)) == (85, 5)


def test_rows_that_were_asked_for_are_never_silently_empty(tmp_path):
    write(tmp_path, "train", sst2_lines(1))
    write(tmp_path, "validation", [])
    with pytest.raises(ValueError, match="train split has 1 rows, train and dev need 2"):
        load_splits(SST2, tmp_path, 10, 10, 0)
    with pytest.raises(ValueError, match="no row is left for test, of which 10 were asked for"):
        load_splits(SST2, tmp_path, 1, 0, 10)
    with pytest.raises(ValueError, match="number of dev rows must not be negative, got -1"):
        load_splits(SST2, tmp_path, 1, -1, 10)


def test_asking_for_no_dev_or_test_rows_is_fine(tmp_path):
    write(tmp_path, "train", sst2_lines(4))
    splits = load_splits(SST2, tmp_path, 3, 0, 0)
    assert (len(splits.train), splits.dev, splits.test) == (3, [], [])


def generated_task() -> Task:
    def generate(split, count, seed):
        return [{"text": f"{split} {seed} {number}"} for number in range(count)]

    return Task("made_up", GeneratedData(generate), ("text",), lambda row: Example(row["text"], (" a", " b")))


def test_a_generated_task_needs_no_data_directory():
    splits = load_splits(generated_task(), None, 3, 2, 1, seed=7)
    assert [row["text"] for row in splits.train] == ["train 7 0", "train 7 1", "train 7 2"]
    assert [row["text"] for row in splits.dev] == ["train 7 3", "train 7 4"]
    assert [row["text"] for row in splits.test] == ["validation 0 0"]
    with pytest.raises(ValueError, match="'made_up' generates its rows; say how many"):
        load_rows(generated_task(), "train", None)


def test_a_dev_row_that_repeats_a_train_row_is_left_out():
    def generate(split, count, seed):
        return [{"text": f"{number % 7}"} for number in range(count)]

    task = Task("repeats", GeneratedData(generate), ("text",), lambda row: Example(row["text"], (" a", " b")))
    splits = load_splits(task, None, 5, 3, 0)
    assert [row["text"] for row in splits.dev] == ["5", "6", "5"]
    with pytest.raises(ValueError, match="no row is left for dev, of which 3 were asked for"):
        load_splits(task, None, 7, 3, 0)


def test_wsc_is_cut_to_what_it_has_and_says_so(shared):
    splits = load_splits(get_task("wsc"), shared / "data", train=1000, dev=500, test=104)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (370, 184, 104)
    assert splits.note == "task 'wsc' has too few rows: 370 train rows instead of 1000, 184 dev rows instead of 500"
