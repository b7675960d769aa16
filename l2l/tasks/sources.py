"""Rows of files (JSON, JSON lines, CSV, TSV, parquet) and of data sets of the hub. Code of a data set is never run.

The hub is read with ``datasets``, files are not: it does not name the line of a malformed row, turns the texts of CSV
cells into numbers and nulls, gives every line of JSON the fields of all others, and copies each file into its cache.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from l2l.tasks.base import HubData, Row, Split

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
"""Kinds of files that can be read, by the end of their names."""

_COLUMN_ROWS = 100
"""Rows of a file of JSON lines by which its columns are known. Not every line need have each."""

_CELL = 1 << 24
"""Most characters of a CSV cell. Python's own limit, 2^17, is less than a long document has."""

_MAY_LACK_LABEL = {"stanfordnlp/snli": "label"}
"""Data sets of which some train and validation rows have no right answer, and the column that is -1 in those."""

_PARQUET_COPY = "refs/convert/parquet"
"""Revision in which the hub keeps a parquet copy of the rows of a data set that is a script."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file, each with its place (``FILE:LINE``, or ``FILE row N`` of parquet). Empty lines are skipped. A ``.json``
    file holds an array of objects, or JSON lines.

    The values of CSV and TSV are texts, as they stand; the first line names the columns.

    Raises:
        ValueError: the first line that cannot be read, by its place, or a name that does not end in `SUFFIXES`.
    """
    check_suffix(path)
    if path.suffix in (".jsonl", ".json"):
        return _array(path) if path.suffix == ".json" and _begins_array(path) else _jsonl(path)
    if path.suffix != ".parquet":
        return _csv(path)
    rows = (row for batch in _parquet_file(path).iter_batches() for row in batch.to_pylist())
    return ((f"{path} row {number}", row) for number, row in enumerate(rows))


def column_names(path: Path) -> tuple[str, ...]:
    """Names of the columns of a file; of JSON lines, those of its first rows.

    Raises:
        ValueError: as `read_file`, or there is no row to tell.
    """
    if path.suffix == ".parquet":
        return tuple(_parquet_file(path).schema_arrow.names)
    names = dict.fromkeys(name for _, row in islice(read_file(path), _COLUMN_ROWS) for name in row)
    if not names:
        raise ValueError(f"{path}: holds no row")
    return tuple(names)


def check_suffix(path: Path) -> None:
    """Raise ValueError where a file is of no kind that can be read."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot read {path.suffix or 'this kind of'} files; use {', '.join(SUFFIXES)}")


def _begins_array(path: Path) -> bool:
    with path.open("rb") as lines:
        return next((line.strip() for line in lines if line.strip()), b"").startswith(b"[")


def _array(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {number}: a row must be a JSON object, not {type(row).__name__}")
        yield f"{path} row {number}", row


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
            yield where, row


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError where it names a field twice, of which the last would silently hold."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands there twice; remove one")
    return found


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(max(_CELL, csv.field_size_limit()))
    # "utf-8-sig" also reads files that begin with a byte order mark, as spreadsheets write them.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header = _next_cells(path, reader)[1]
        if not header:
            raise ValueError(f"{path}:1: the first line must name the columns")
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}:1: two columns are named {twice!r}; give each a name of its own")
        while True:
            where, cells = _next_cells(path, reader)
            if cells is None:
                return
            if len(cells or header) != len(header):
                raise ValueError(
                    f"{where}: {len(cells)} cells, but the first line names {len(header)} columns; "
                    "put texts that hold the separator between double quotes"
                )
            if cells:
                yield where, dict(zip(header, cells, strict=True))


def _next_cells(path: Path, reader: Any) -> tuple[str, list[str] | None]:
    """The place of a row, which may go over several lines, and its cells; None at the end."""
    where = f"{path}:{reader.line_num + 1}"
    try:
        return where, next(reader, None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not CSV in UTF-8: {error}") from error


def _parquet_file(path: Path) -> Any:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error


def hub_rows(source: HubData, split: Split, order: Callable[[int], list[int]]) -> list[Row]:
    """Download (or take from the local cache) one split and return the rows that ``order(total)`` lists.

    Rows without a right answer are dropped before, where the data set is known to have some: ``total`` is without them.
    Where the hub cannot be reached, or ``HF_HUB_OFFLINE`` or ``HF_DATASETS_OFFLINE`` forbids it, rows come from the
    cache of ``datasets`` or from the files that ``hf download`` left in the hub's cache, at the pinned revision.

    Raises:
        FileNotFoundError: the data set is neither in a cache nor can it be fetched.
        ValueError: the data set has no such config or split.
    """
    from datasets.exceptions import DatasetsError

    hub_split = source.splits[0 if split == "train" else 1]
    try:
        try:
            dataset = _load_by_id(source, hub_split)
        except (OSError, DatasetsError, ValueError):
            # Offline, ``datasets`` itself does not look into the hub's cache.
            dataset = _load_snapshot(source, hub_split)
            if dataset is None:
                raise
    except (OSError, DatasetsError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        raise FileNotFoundError(_absent_message(source, hub_split, error)) from error
    except ValueError as error:
        if "find cache for" in str(error):  # offline, another config of the data set being in the cache
            raise FileNotFoundError(_absent_message(source, hub_split, error)) from error
        raise ValueError(f"{_named(source, hub_split)}: {_one_line(error)}") from error
    if source.path in _MAY_LACK_LABEL:
        labels = dataset[_MAY_LACK_LABEL[source.path]][:]
        # Only -1 counts as no label, so that any other wrong value is still found and named.
        dataset = dataset.select([index for index, label in enumerate(labels) if label != -1])
    return [dict(row) for row in dataset.select(order(len(dataset)))]


def _load_by_id(source: HubData, hub_split: str) -> Any:
    from datasets import load_dataset

    pinned: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    try:
        dataset = load_dataset(source.path, source.name, split=hub_split, **pinned)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        if source.revision is not None:
            raise FileNotFoundError(
                f"revision {source.revision!r} holds a script, which is never run; pin {_PARQUET_COPY!r} instead"
            ) from error
    else:
        if source.revision is not None and dataset.cache_files:
            # Offline, ``datasets`` returns the rows used last, whatever the revision. The hub's cache notes the commit
            # of a branch or tag in the name of the snapshot's folder.
            commit, wanted = Path(dataset.cache_files[0]["filename"]).parent.name, source.revision
            if not _COMMIT.fullmatch(wanted):
                wanted = getattr(_snapshot(source, wanted), "name", None)
            if wanted is not None and _COMMIT.fullmatch(commit) and commit != wanted:
                raise FileNotFoundError(f"the cache of datasets holds commit {commit}, not revision {source.revision!r}")
        return dataset
    copy = f"hf://datasets/{source.path}@{_PARQUET_COPY.replace('/', '%2F')}/{source.name or 'default'}/{hub_split}"
    return load_dataset("parquet", data_files={hub_split: f"{copy}/*.parquet"}, split=hub_split)


def _load_snapshot(source: HubData, hub_split: str) -> Any:
    """The split from files in the hub's cache; None where they are not there."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    snapshot = _snapshot(source, source.revision)
    if snapshot is not None and not (snapshot / f"{source.path.split('/')[-1]}.py").is_file():
        try:
            return load_dataset(str(snapshot), source.name, split=hub_split)
        except (OSError, DatasetsError):
            pass  # only some of its files were downloaded
    copy = _snapshot(source, _PARQUET_COPY) if source.revision in (None, _PARQUET_COPY) else None
    files = [] if copy is None else sorted(map(str, (copy / (source.name or "default") / hub_split).glob("*.parquet")))
    return load_dataset("parquet", data_files={hub_split: files}, split=hub_split) if files else None


def _snapshot(source: HubData, revision: str | None) -> Path | None:
    """The folder of the hub's cache that holds a revision, if it does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.path, repo_type="dataset", revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _named(source: HubData, hub_split: str) -> str:
    name = f", config {source.name!r}" if source.name else ""
    at = f" at revision {source.revision!r}" if source.revision else ""
    return f"data set {source.path!r}{at}{name}, split {hub_split!r}"


def _absent_message(source: HubData, hub_split: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    revision = f" --revision {source.revision}" if source.revision else ""
    return (
        f"{_named(source, hub_split)} is neither in the local cache nor can it be fetched: {_one_line(error)}; run `hf "
        f"download {source.path} --repo-type dataset{revision}` where there is a network, which puts it into "
        f"{HF_HUB_CACHE}, or give a data directory with <task>/train.jsonl and <task>/validation.jsonl"
    )


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
