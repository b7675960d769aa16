"""Rows of a task, loaded and checked, and their sampling into train, dev and test rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2l.tasks.base import FileData, GeneratedData, HubData, Row, Split, Task, render
from l2l.tasks.sources import hub_rows, read_file

TEST_SEED = 0
"""The test rows are the same whatever the seed of a run, so that runs compare."""

HELD_OUT = 5
"""Of data that come as one split, one row in so many is validation, the same ones whatever the seed of a run."""

_SPARE = 4
"""Generated rows can repeat, so this many are drawn for each dev row that is to differ from all train rows."""


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to select by, and to report on; no dev row equals a train row."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]
    note: str = ""
    """Which rows were held out of data that come as one split, and which counts were cut because rows were too few."""


def load_rows(task: Task, split: Split, data_dir: str | Path | None, count: int | None = None, seed: int = 0) -> list[Row]:
    """Rows of one split in the order of a permutation fixed by ``seed``, at most ``count`` of them.

    A task of generated rows, or of files of its own, ignores ``data_dir``. Otherwise rows come from
    ``<data_dir>/<task>/<split>.jsonl``, or, without ``data_dir``, from the hub through ``datasets``. All rows of a file
    are checked.

    Raises:
        FileNotFoundError: the file, or the hub's data set, cannot be reached.
        ValueError: a row is malformed or cannot be rendered (the message names file and line), or a generated task
            is asked for rows without saying how many.
    """
    if isinstance(task.source, GeneratedData):
        if count is None:
            raise ValueError(f"task {task.name!r} generates its rows; say how many")
        rows: list[Row] = list(task.source.generate(split, count, seed))
        return _checked(task, rows, f"generated {split} row ")
    parted = held_out_of(task) if data_dir is None or isinstance(task.source, FileData) else False

    def order(total: int) -> list[int]:
        part = part_of(total, split) if parted else range(total)
        return [part[index] for index in _order(len(part), count, seed)]

    if isinstance(task.source, FileData):
        paths = task.source.train if split == "train" or parted else task.source.validation
    elif data_dir is None:
        return _checked(task, hub_rows(task.source, split, order), f"{task.source.path} {split} row ")
    else:
        paths = (_file(task, task.source, split, Path(data_dir)),)
    rows = []
    for path in paths:
        for where, row in read_file(path):
            render(task, row, where)
            rows.append(row)
    return [rows[index] for index in order(len(rows))]


def held_out_of(task: Task) -> bool:
    """Whether a task's data come as one split, of which a fixed share is validation."""
    if isinstance(task.source, FileData):
        return not task.source.validation
    return isinstance(task.source, HubData) and task.source.splits[0] == task.source.splits[1]


def part_of(total: int, split: Split) -> list[int]:
    """Indices of the rows, of ``total`` in one split, that serve as train or as validation, ascending.

    At least one row is validation. Neither part depends on anything but ``total``.
    """
    shuffled = np.random.default_rng(TEST_SEED).permutation(total).tolist()
    validation = max(1, total // HELD_OUT)
    return sorted(shuffled[:validation] if split == "validation" else shuffled[validation:])


def load_splits(task: Task, data_dir: str | Path | None, train: int, dev: int, test: int, seed: int = 0) -> Splits:
    """Sample train and dev rows from the train split and test rows from the validation split.

    One permutation of the train split: the first ``train`` rows train, the next ``dev`` rows are dev, leaving out
    any that equals a train row. If the split has fewer than ``train + dev`` rows, dev gets what it asked for but at
    most a third (at least one row), and train at most the rest. Test is a fixed sample of the validation split,
    the same for every seed.

    Raises:
        ValueError: a count is negative, or data that were asked for would be empty.
        FileNotFoundError, ValueError: as `load_rows`.
    """
    for name, count in (("train", train), ("dev", dev), ("test", test)):
        if count < 0:
            raise ValueError(f"the number of {name} rows must not be negative, got {count}")
    wanted = train + dev * (_SPARE if isinstance(task.source, GeneratedData) else 1)
    rows = load_rows(task, "train", data_dir, wanted, seed) if wanted else []
    train_count, dev_count = _share(task, len(rows), train, dev)
    train_rows = rows[:train_count]
    seen = set(map(_key, train_rows))
    dev_rows = [row for row in rows[train_count:] if _key(row) not in seen][:dev_count]
    test_rows = load_rows(task, "validation", data_dir, test, TEST_SEED) if test else []
    note = _note(task, (("train", train, train_rows), ("dev", dev, dev_rows), ("test", test, test_rows)))
    alone = data_dir is None or isinstance(task.source, FileData)
    held = held_out_note(task) if test and alone else ""
    return Splits(train_rows, dev_rows, test_rows, "; ".join(filter(None, (held, note))))


def held_out_note(task: Task) -> str:
    """Says that validation rows are held out of the train rows, where they are."""
    if not held_out_of(task):
        return ""
    return f"task {task.name!r} has no validation data: a fixed 1 in {HELD_OUT} of its train rows is held out as such"


def _note(task: Task, sizes: tuple[tuple[str, int, list[Row]], ...]) -> str:
    """One sentence on what fell short; an error where nothing is left."""
    for name, asked, got in sizes:
        if asked and not got:
            why = "; rows that equal a train row do not count" if name == "dev" else ""
            raise ValueError(f"task {task.name!r}: no row is left for {name}, of which {asked} were asked for{why}")
    cut = [f"{len(got)} {name} rows instead of {asked}" for name, asked, got in sizes if len(got) < asked]
    return f"task {task.name!r} has too few rows: {', '.join(cut)}" if cut else ""


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _share(task: Task, available: int, train: int, dev: int) -> tuple[int, int]:
    """How many rows train and dev get."""
    if train + dev <= available:
        return train, dev
    needed = (train > 0) + (dev > 0)
    if available < needed:
        raise ValueError(f"task {task.name!r}: the train split has {available} rows, train and dev need {needed}")
    dev_share = min(dev, max(1, available // 3)) if train else min(dev, available)
    return min(train, available - dev_share), dev_share


def _order(total: int, count: int | None, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(total)[:count].tolist()


def _checked(task: Task, rows: list[Row], where: str) -> list[Row]:
    for number, row in enumerate(rows):
        render(task, row, f"{where}{number}")
    return rows


def _file(task: Task, source: HubData, split: Split, data_dir: Path) -> Path:
    path = data_dir / task.name / f"{split}.jsonl"
    if not path.is_file():
        fields = ", ".join(task.fields) or "that the task names"
        raise FileNotFoundError(
            f"no file {str(path)!r}; put one JSON object per line there, with the fields {fields} "
            f"(as in the hub's {source.path}), or leave out the data directory to download it"
        )
    return path
