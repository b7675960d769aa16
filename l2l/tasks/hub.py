"""Rows of a data set of the hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from l2l.tasks.base import HubData, Row, Split

_MAY_LACK_LABEL = {"stanfordnlp/snli": "label"}
"""Data sets of which some train and validation rows have no right answer, and the column that is -1 in those."""


def hub_rows(source: HubData, split: Split, order: Callable[[int], list[int]]) -> list[Row]:
    """Download (or take from the local cache) one split and return the rows that ``order(total)`` lists.

    Rows without a right answer are dropped before, where the data set is known to have some: ``total`` is without them.

    Raises:
        FileNotFoundError: the data set is neither in the cache nor can it be fetched.
    """
    from datasets.exceptions import DatasetsError

    hub_split = source.splits[0 if split == "train" else 1]
    try:
        dataset = _load(source, hub_split)
    except (OSError, DatasetsError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        raise FileNotFoundError(_message(source, hub_split, error)) from error
    if source.path in _MAY_LACK_LABEL:
        dataset = _labelled(dataset, _MAY_LACK_LABEL[source.path])
    return [dict(row) for row in dataset.select(order(len(dataset)))]


def _labelled(dataset: Any, column: str) -> Any:
    """The rows with a label. Only -1 counts as none, so that any other wrong value is still found and named."""
    return dataset.select([index for index, label in enumerate(dataset[column][:]) if label != -1])


def _load(source: HubData, hub_split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.name, split=hub_split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    # Data sets of the old kind are a script, which is never run; the hub keeps a parquet copy of their rows.
    copy = f"hf://datasets/{source.path}@refs%2Fconvert%2Fparquet/{source.name or 'default'}/{hub_split}/*.parquet"
    return load_dataset("parquet", data_files={hub_split: copy}, split=hub_split)


def _message(source: HubData, hub_split: str, error: Exception) -> str:
    name = f", config {source.name!r}" if source.name else ""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"data set {source.path!r}{name}, split {hub_split!r} is neither in the local cache nor can it be fetched: "
        f"{reason}; run once where there is a network, or give a data directory with <task>/train.jsonl and "
        f"<task>/validation.jsonl"
    )
