"""A comparison that is killed goes on where it was, repeats nothing, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import SMALL, Here, small

from l2l.experiments.presets import compare

GIVEN: dict[str, Any] = {"methods": ["mezo", "dizo"], "passes": 6}
RUNS = 2 * (2 + 1)
"""Two methods: two step sizes each on the tuning seed, and one seed."""
TIMES = {"seconds", "peak_bytes", "folder"}
"""What differs from one run to the next."""
PATIENCE = 400.0


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Runs that are done -> which file says so, and when it was written."""
    found = {path: path.stat() for path in out.glob("runs/tiny/*/summary.json")}
    return {path.parent.name: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def kill_at_a_random_point(arguments: list[str], out: Path) -> list[int]:
    """Begin the command, and kill it alone, with no warning, somewhere between its first and its last run.

    The processes that were its workers, by number, so that they can be looked for.
    """
    runs, delay = random.randint(1, RUNS - 2), random.uniform(0, 1)
    print(f"killed {delay:.2f} s after {runs} runs")  # shown where the test fails
    process = subprocess.Popen([sys.executable, "-m", "l2l", "compare", *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(finished(out)) < runs:
            assert process.poll() is None, "the comparison ended before it was killed"
            assert time.monotonic() < deadline, "the comparison never got as far as it should be killed"
            time.sleep(0.02)
        time.sleep(delay)
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return workers


def children(parent: int) -> list[int]:
    """Processes that a process has begun."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(number) for path in lists for number in path.read_text().split()]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are looked up in /proc")
def test_killed_at_a_random_point_it_repeats_no_run_and_ends_with_the_same_results(tmp_path, monkeypatch):
    out = tmp_path / "killed"
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(SMALL | GIVEN))
    workers = kill_at_a_random_point(["--config", str(written), "--out", str(out)], out)
    assert workers
    deadline = time.monotonic() + 10
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers), "a worker outlived its parent and may still write"
    before = finished(out)
    assert not (out / "summary.json").exists()

    here = Here()
    monkeypatch.setattr(compare, "executor_of", lambda name, processes, address=None: here)
    resumed = compare.run_comparison(small(out, **GIVEN))
    after = finished(out)
    assert len(before) + len(here.done) == len(after) == RUNS
    assert {name: after[name] for name in before} == before
    assert json.loads((out / "summary.json").read_text())["runs"] == RUNS

    whole = compare.run_comparison(small(tmp_path / "whole", **GIVEN))
    same = [name for name in whole if name != "config"]
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}
    assert rows(out) == rows(tmp_path / "whole")


def rows(out: Path) -> list[dict[str, Any]]:
    """The results but for what was timed."""
    table = pytest.importorskip("pyarrow.parquet").read_table(out / "results.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name not in TIMES} for row in table]
