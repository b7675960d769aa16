"""The script behind docs/tasks.md runs in a process of its own and writes the same file each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_task_table_is_written_as_a_whole_and_names_its_command(tmp_path: Path):
    out = tmp_path / "tasks.md"
    command = [sys.executable, "benchmarks/task_table.py", "--rows", "5", "--tasks", "world_topic", "sst2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert "`python benchmarks/task_table.py --data_dir DATA --models l2l/tiny --rows 5 --out" in text
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["world_topic@1", "sst2@1", "world_topic", "sst2"]
    assert lines[0].startswith("| `world_topic@1` | options | accuracy | generated | as asked | ")
    assert lines[1].count("no data here") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.md"]
