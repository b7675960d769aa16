"""Rows of a task, loaded and checked, and their sampling into train, dev and test rows."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from l2l.tasks.base import FileData, GeneratedData, GivenData, HubData, Row, Split, Task, render
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

    A task of generated or given rows, or of files of its own, ignores ``data_dir``. Otherwise rows come from
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
        for number, row in enumerate(rows):
            render(task, row, f"generated {split} row {number}")
        return rows
    parted = held_out_of(task) if data_dir is None or isinstance(task.source, FileData | GivenData) else False

    def order(total: int) -> list[int]:
        part = part_of(total, split) if parted else range(total)
        return [part[index] for index in np.random.default_rng(seed).permutation(len(part))[:count].tolist()]

    if isinstance(task.source, GivenData):
        return [task.source.rows[index] for index in order(len(task.source.rows))]
    if isinstance(task.source, FileData):
        paths = task.source.train if split == "train" or parted else task.source.validation
    elif data_dir is None:
        rows = hub_rows(task.source, split, order)
        for number, row in enumerate(rows):
            render(task, row, f"{task.source.path} {split} row {number}")
        return rows
    else:
        paths = (Path(data_dir) / task.name / f"{split}.jsonl",)
        if not paths[0].is_file():
            raise FileNotFoundError(
                f"no file {str(paths[0])!r}; put one JSON object per line there, with the fields "
                f"{', '.join(task.fields) or 'that the task names'} (as in the hub's {task.source.path}), or leave out the "
                "data directory to download it"
            )
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
    if isinstance(task.source, GivenData):
        return True
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
    train_count, dev_count, needed = train, dev, (train > 0) + (dev > 0)
    if len(rows) < needed:
        raise ValueError(f"task {task.name!r}: the train split has {len(rows)} rows, train and dev need {needed}")
    if len(rows) < train + dev:
        dev_count = min(dev, max(1, len(rows) // 3) if train else len(rows))
        train_count = min(train, len(rows) - dev_count)
    key = partial(json.dumps, sort_keys=True, default=str)
    train_rows = rows[:train_count]
    seen = set(map(key, train_rows))
    dev_rows = [row for row in rows[train_count:] if key(row) not in seen][:dev_count]
    test_rows = load_rows(task, "validation", data_dir, test, TEST_SEED) if test else []
    short = []
    for name, asked, got in (("train", train, train_rows), ("dev", dev, dev_rows), ("test", test, test_rows)):
        if asked and not got:
            why = "; rows that equal a train row do not count" if name == "dev" else ""
            raise ValueError(f"task {task.name!r}: no row is left for {name}, of which {asked} were asked for{why}")
        short += [f"{len(got)} {name} rows instead of {asked}"] if len(got) < asked else []
    notes = [held_out_note(task)] if test and (data_dir is None or isinstance(task.source, FileData | GivenData)) else []
    notes += [f"task {task.name!r} has too few rows: {', '.join(short)}"] if short else []
    return Splits(train_rows, dev_rows, test_rows, "; ".join(filter(None, notes)))


def held_out_note(task: Task) -> str:
    """Says that validation rows are held out of the train rows, where they are."""
    if not held_out_of(task):
        return ""
    return f"task {task.name!r} has no validation data: a fixed 1 in {HELD_OUT} of its train rows is held out as such"
