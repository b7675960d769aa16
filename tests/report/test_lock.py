"""Kind 13 of issue 16, *no lock on a run directory*.

One process at a time writes into a directory; what a killed one left does not block. Situations of others: a file system
without locks (ComparativeGenomicsToolkit/cactus #1299), one that locks only files open for writing (openwrt/buildscripts #1),
and one that locks on each machine by itself (realiti4/claude-swap #374).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from l2l.report import run_directory
from l2l.report.run_directory import LOCK, RunDirectory, locked

CONFIG = {"out": "somewhere", "steps": 3}

pytestmark = pytest.mark.skipif(run_directory.fcntl is None, reason="this system has no flock")


@contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """A process that has the directory to itself; it is killed, with no warning, at the end of the block."""
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        with locked(folder):
            os.write(writes, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(reads, 1)
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reads)
        os.close(writes)


def test_a_second_process_is_refused_with_the_first_ones_number_and_machine_and_a_killed_one_does_not_block(tmp_path):
    RunDirectory(tmp_path, CONFIG).create().release()
    before = (tmp_path / "config.yaml").read_bytes()
    with another_process(tmp_path) as first:
        for overwrite in (False, True):
            with pytest.raises(BlockingIOError, match=rf"process {first} on .* writes into .*: choose another --out, or wait"):
                RunDirectory(tmp_path, {**CONFIG}, overwrite).create()
        with pytest.raises(BlockingIOError), RunDirectory(tmp_path, CONFIG):
            pass
        assert (tmp_path / "config.yaml").read_bytes() == before
    assert (tmp_path / LOCK).exists()
    with RunDirectory(tmp_path, CONFIG) as folder:
        folder.create()
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_it_is_let_go_after_an_error_in_the_same_process_too(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path, CONFIG) as folder:
            folder.create()
            raise ZeroDivisionError
    RunDirectory(tmp_path, CONFIG).create().finish({})
    assert not (tmp_path / LOCK).exists()


def test_of_two_that_begin_in_an_empty_directory_the_later_one_is_refused_even_when_the_first_has_ended(tmp_path):
    first, second, third = (RunDirectory(tmp_path / "run", CONFIG) for _ in range(3))
    first.create()
    with pytest.raises(BlockingIOError, match="writes into"):
        second.create()
    first.checkpoint.write_bytes(b"state")
    first.release()
    with pytest.raises(BlockingIOError, match=r"has written into .* meanwhile: run the same command again"):
        second.create()
    RunDirectory(tmp_path / "run", CONFIG).create().finish({})
    with pytest.raises(ValueError, match="holds this run, finished"):
        third.create()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_a_living_process_of_this_machine_is_respected(number, tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with another_process(tmp_path) as first, pytest.raises(BlockingIOError, match=f"process {first}"), locked(tmp_path):
        pass
    with locked(tmp_path):  # it has been killed
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_process_of_another_machine_that_took_no_leave_is_named(tmp_path, caplog):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 17, "host": "elsewhere"}))
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert "process 17 on elsewhere did not take its leave" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b'{"pid": "x"}'])
def test_an_unreadable_lock_does_no_harm(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        pass


def test_overwriting_a_link_to_a_directory_empties_that_and_keeps_the_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    RunDirectory(tmp_path / "out", CONFIG).create().finish({})
    (tmp_path / "disk" / "model").mkdir()
    (tmp_path / "disk" / "link").symlink_to(tmp_path)
    RunDirectory(tmp_path / "out", {**CONFIG, "steps": 4}, overwrite=True).create().release()
    assert (tmp_path / "out").is_symlink()
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["config.yaml"]
