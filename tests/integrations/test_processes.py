"""ZOTrainer in two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[Any]:
    """What each process has written."""
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(HERE / "two_processes.py"), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))]


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes, each of which imports torch
def test_two_processes_step_as_one_with_two_micro_batches_to_the_last_bit_and_resume(tmp_path: Path):
    (alone,) = run(tmp_path / "one", "2")
    both = run(tmp_path / "two", "1", launcher=LAUNCHER)
    assert both == [alone, alone]
    assert len(set(alone["losses"])) == 4
    shutil.rmtree(tmp_path / "two/out/checkpoint-4")
    rest = run(tmp_path / "two", "1", "resume", launcher=LAUNCHER)
    assert [one["losses"] for one in rest] == [alone["losses"][2:]] * 2
    assert [one["weights"] for one in rest] == [alone["weights"]] * 2
