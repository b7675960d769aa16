"""One file over HTTP: continued where it broke off, checked by its sha256, complete before it takes its name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TypeAlias
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PIECE = 1 << 16
PATIENCE = 30.0
"""Seconds without a byte after which a connection is given up."""
ATTEMPTS = 5
"""Connections in a row that break off without a byte more."""

Report: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes that are there, and with how many there will be, if that is known."""


def silent(have: int, total: int | None) -> None:
    """Report nothing."""


def sha256_of(path: Path) -> str:
    """Of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, target: Path, sha256: str, size: int | None = None, report: Report = silent) -> Path:
    """The file at ``url`` as ``target``; what is there already, whole or in part, is used.

    A transfer that breaks off is continued, in this call and in the next one, where the server can do so; else it begins
    again. A part that turns out to belong to another file is thrown away, once.

    Args:
        size: more bytes than this are refused.

    Raises:
        FileNotFoundError: the server cannot be reached, has no such file, or broke off again and again.
        ValueError: the file is not the one that the checksum is of; it is removed.
    """
    if target.is_file() and sha256_of(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target, sha256)
    continued = part.exists()
    if continued and sha256_of(part) == sha256:  # interrupted between the last byte and the name
        return part.replace(target)
    _receive(url, part, size, report)
    if sha256_of(part) != sha256 and continued:
        part.unlink()
        _receive(url, part, size, report)
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise ValueError(
            f"{url} has sha256 {found}, but {sha256} was asked for: the file is not the one that was checked, and was "
            "removed"
        )
    return part.replace(target)


def part_of(target: Path, sha256: str) -> Path:
    """Where a file is collected: its name says what it is to become."""
    return target.with_name(f".{target.name}.{sha256[:12]}.part")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _receive(url: str, part: Path, size: int | None, report: Report) -> None:
    """Collect until everything is there."""
    fruitless = 0
    while fruitless < ATTEMPTS:
        before = _length(part)
        if _transfer(url, part, size, report):
            return
        fruitless = 0 if _length(part) > before else fruitless + 1
    raise FileNotFoundError(
        f"{url} broke off {ATTEMPTS} times in a row; {_length(part)} bytes are kept: run the same command again later"
    )


def _transfer(url: str, part: Path, size: int | None, report: Report) -> bool:
    """One connection; whether everything is there after it."""
    with _open(url, _length(part)) as response:
        have = _begin(response, _length(part))
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with part.open("ab" if have else "wb") as file:
            while piece := _read(response):
                have += len(piece)
                if size is not None and max(have, total or 0) > size:
                    break
                file.write(piece)
                report(have, total)
    if size is not None and max(have, total or 0) > size:
        part.unlink()
        raise ValueError(f"{url} gives more than the {size} bytes that the file has: it is another, and was removed")
    return piece is not None and (total is None or have >= total)


def _read(response: HTTPResponse) -> bytes | None:
    """The next piece; empty at the end, None where the connection broke off."""
    try:
        return response.read(PIECE)
    except (OSError, HTTPException):
        return None


def _begin(response: HTTPResponse, have: int) -> int:
    """How many of the bytes that are there the server goes on from; 0 where it begins again."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return have if response.status == 206 and found and int(found[1]) == have else 0


def _open(url: str, have: int) -> HTTPResponse:
    headers = {"Accept-Encoding": "identity", "User-Agent": "l2l"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=PATIENCE)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # more is there than the server has
            return _open(url, 0)
        raise FileNotFoundError(f"{url} is not to be had: the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise FileNotFoundError(
            f"{url} cannot be reached ({reason}): run the command where there is a network and copy the folder that it "
            "prints, or give the directory of a tuner"
        ) from error


@contextmanager
def progress_bar(label: str, visible: bool = True) -> Iterator[Report]:
    """A bar in bytes, from the first report on; what it yields is a :data:`Report`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), disable=not visible)

    def report(have: int, total: int | None) -> None:
        if not bar.tasks:
            bar.add_task(label, total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=have, total=total)

    try:
        yield report
    finally:
        if bar.tasks:
            bar.stop()
