"""The C library is built once and found again, safely; where it cannot be had, the next backend serves and says so."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from l2l.noise import Key, active_backend, add_noise_to, backend_problem, numba
from l2l.noise import dispatch as backends
from l2l.noise import native as build
from l2l.noise.dispatch import VARIABLE

pytestmark = pytest.mark.in_turn

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler here")
needs_numba = pytest.mark.skipif(backend_problem("numba") is not None, reason=str(backend_problem("numba")))
ROOT = Path(__file__).parents[2]
QUICK = ("-O0", "-ffp-contract=off", "-shared", "-fPIC")


def forget() -> None:
    """As in a new process."""
    build.library.cache_clear()
    numba.available.cache_clear()
    backends._serving.cache_clear()


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty cache folders, and a library that is looked for anew, and built in no time."""
    monkeypatch.setattr(build, "FLAGS", QUICK)
    monkeypatch.setenv("L2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def without_compiler(uncached: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(uncached))
    return uncached


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba, "find_spec", lambda name: None)


@needs_compiler
def test_a_library_is_built_once_and_then_found_in_the_cache(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    assert build.library() is not None
    (built,) = (uncached / "cache" / "l2l").iterdir()
    build.library.cache_clear()
    monkeypatch.setenv("PATH", str(uncached))
    assert build.library() is not None
    assert list((uncached / "cache" / "l2l").iterdir()) == [built]
    assert active_backend() == "native"


@needs_numba
def test_numba_leaves_the_number_of_torchs_threads_as_it_was():
    code = (
        "import torch; from l2l.noise import Key, add_noise_to; "
        "add_noise_to(torch.zeros(9), 'w', Key(0), [1.0]); print(torch.get_num_threads())"
    )
    given = os.environ | {VARIABLE: "numba", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


@needs_numba
def test_without_a_compiler_numba_serves_and_one_line_says_so(
    without_compiler: Path, caplog: pytest.LogCaptureFixture, key: Key
):
    with caplog.at_level(logging.WARNING, logger="l2l"):
        assert [active_backend() for _ in range(3)] == ["numba"] * 3
        add_noise_to(moved := torch.zeros(100), "w", key, [1e-3])
    assert moved.any()
    assert [record.getMessage() for record in caplog.records] == [
        "noise on cpu is made by the slower backend numba: no C compiler is on PATH"
    ]


def test_without_a_compiler_and_numba_the_reference_serves_and_one_line_says_so(
    without_compiler: Path, without_numba: None, caplog: pytest.LogCaptureFixture, key: Key
):
    assert build.library() is None
    assert backend_problem("numba") == "numba is not installed"
    with caplog.at_level(logging.WARNING, logger="l2l"):
        assert [active_backend() for _ in range(3)] == ["reference"] * 3
        add_noise_to(moved := torch.zeros(100), "w", key, [1e-3])
    assert moved.any()
    assert [record.getMessage() for record in caplog.records] == [
        "noise on cpu is made by the slower backend reference: no C compiler is on PATH"
    ]


@needs_compiler
def test_nothing_is_logged_where_the_fastest_backend_serves(uncached: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="l2l"):
        assert active_backend() == "native"
        assert active_backend("cpu", torch.float64) == "reference"
    assert caplog.records == []


def test_a_numba_that_cannot_be_imported_is_no_backend(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numba, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "numba", None)
    assert str(backend_problem("numba")).startswith("numba cannot be imported: ")


def test_native_cannot_be_forced_where_it_cannot_be_built(without_compiler: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(ValueError, match="L2L_NOISE=native, but no C compiler is on PATH; use L2L_NOISE=auto"):
        active_backend()


def test_numba_cannot_be_forced_where_it_is_not_installed(uncached: Path, without_numba: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "numba")
    with pytest.raises(ValueError, match="L2L_NOISE=numba, but numba is not installed; use L2L_NOISE=auto"):
        active_backend()


def test_a_compiler_that_fails_leaves_no_file_and_says_what_serves(
    uncached: Path, without_numba: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    broken = uncached / "bin" / "cc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/bin:/usr/bin")
    with caplog.at_level(logging.WARNING, logger="l2l"):
        assert active_backend() == "reference"
    assert not list((uncached / "cache" / "l2l").iterdir())
    (record,) = caplog.records
    assert "made by the slower backend reference: the C compiler failed" in record.getMessage()


@needs_compiler
def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    (uncached / "file").write_text("in the way")
    monkeypatch.setenv("L2L_CACHE", str(uncached / "file"))
    assert build.library() is not None
    assert [path.suffix for folder in uncached.glob("l2l-*") for path in folder.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_cache_gives_way_to_the_temporary_folder(uncached: Path):
    (uncached / "cache").mkdir(mode=0o500)
    assert build.library() is not None
    assert [path.suffix for folder in uncached.glob("l2l-*") for path in folder.iterdir()] == [".so"]


@needs_compiler
def test_a_folder_that_refuses_to_be_written_gives_way_to_the_next(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    cache = uncached / "cache" / "l2l"
    made = tempfile.TemporaryDirectory

    def refusing(dir: Path) -> tempfile.TemporaryDirectory[str]:
        if dir == cache:
            raise PermissionError(f"[Errno 13] Permission denied: '{dir}'")
        return made(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refusing)
    assert build.library() is not None
    assert list(cache.iterdir()) == []
    assert [path.suffix for folder in uncached.glob("l2l-*") for path in folder.iterdir()] == [".so"]


def test_without_any_folder_to_write_to_another_backend_serves(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    (uncached / "file").write_text("in the way")
    monkeypatch.setenv("L2L_CACHE", str(uncached / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(uncached / "file"))
    assert build.library() is None
    assert active_backend() in ("numba", "reference")


@needs_compiler
def test_a_folder_of_another_user_is_not_trusted(uncached: Path, monkeypatch: pytest.MonkeyPatch):
    assert build.library() is not None
    build.library.cache_clear()
    (uncached / "l2l-123456").mkdir()
    monkeypatch.setattr("os.getuid", lambda: 123_456)
    assert build.library() is None


RACER = """
import sys, time
from pathlib import Path
import torch
from l2l.noise import Key, active_backend, add_noise_to, native as build
me, here, build.FLAGS = sys.argv[1], Path(sys.argv[2]), tuple(sys.argv[3:])
(here / me).touch()
while len(list(here.iterdir())) < 2:
    time.sleep(0.001)
moved = torch.zeros(1000)
add_noise_to(moved, "w", Key(1), [1e-3])
print(active_backend(), float(moved.sum()))
"""


@pytest.mark.slow
@needs_compiler
def test_two_processes_that_build_at_once_both_succeed_and_leave_one_file(tmp_path: Path):
    start = tmp_path / "start"
    start.mkdir()
    environment = {**os.environ, "L2L_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop(VARIABLE, None)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(k), str(start), *QUICK],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    told = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert told[0][0].startswith("native ")
    assert [path.suffix for path in (tmp_path / "cache" / "l2l").iterdir()] == [".so"]
