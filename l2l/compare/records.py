"""``results.csv`` and ``results.parquet``: a row per run, tuning runs among them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from l2l.report.files import write_whole

NAME = "results"


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the records, whole; Parquet only where ``pyarrow`` is installed."""
    written = [write_whole(folder / f"{NAME}.csv", lambda path: _write_csv(path, records))]
    try:
        parquet = import_module("pyarrow.parquet")
        arrow = import_module("pyarrow")
    except ImportError:
        return written
    table = arrow.Table.from_pylist([dict(record) for record in records])
    return [*written, write_whole(folder / f"{NAME}.parquet", lambda path: parquet.write_table(table, path))]


def _write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
