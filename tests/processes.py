"""Commands in a process of their own, to be killed or interrupted in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE = 120.0
"""Seconds until a process counts as stuck."""


def interrupt_when(arguments: Sequence[str], ready: Callable[[], bool], number: signal.Signals) -> tuple[int, str, str]:
    """Run ``l2l`` with these arguments, send the signal once ``ready``; exit code, stdout, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "l2l", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # SIGINT is not ignored: conftest.py sees to it
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not ready():
            assert time.monotonic() < deadline, "the command never got as far as it should be interrupted"
            time.sleep(0.005)
        process.send_signal(number)
        out, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, error


def kill_when_saved(arguments: Sequence[str], out: Path) -> None:
    """Run a command until its first checkpoint is there, then kill -9."""
    code, _, error = interrupt_when(arguments, (out / "checkpoint.safetensors").is_file, signal.SIGKILL)
    assert code == -signal.SIGKILL, error
    assert not (out / "summary.json").exists()


def break_off_when_saved(arguments: Sequence[str], out: Path, number: signal.Signals = signal.SIGINT) -> str:
    """Run a command until its first checkpoint is there, then send Ctrl-C, or SIGTERM; gives what it said on stderr."""
    code, _, error = interrupt_when(arguments, (out / "checkpoint.safetensors").is_file, number)
    assert code == 128 + number, error
    assert not (out / "summary.json").exists()
    return error
