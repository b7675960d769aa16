"""The benchmark scripts run, in a process of their own, on the smallest shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import document, markdown_table

from l2l.tools.bench import hardware

ROOT = Path(__file__).parent.parent.parent


def page(script: str, out: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options, "--repeats", "1", "--length", "8", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == out.read_text().strip()
    return out.read_text()


def test_without_cuda_the_gpu_script_measures_a_small_shape_and_says_what_is_missing(tmp_path: Path):
    text = page("gpu.py", tmp_path / "gpu.md")
    assert "GPU figures are missing" in text
    assert torch.__version__ in text
    assert text.startswith(f"# {hardware()['date']}: ")
    row = next(line for line in text.splitlines() if line.startswith("| opt-tiny-shape | bf16 |"))
    assert row.endswith("| yes |")
    assert "fp32 yes, bf16 yes" in text


def test_the_step_script_has_a_row_per_dtype_and_number_of_threads(tmp_path: Path):
    text = page("step.py", tmp_path / "step.md", "--model", "opt-tiny-shape", "--batch_size", "2", "--threads", "1")
    rows = [line for line in text.splitlines() if line.startswith("| opt-tiny-shape ")]
    assert [row.split(" | ")[1] for row in rows] == ["fp32", "bf16"]


def test_a_table_has_the_columns_of_its_first_row_and_dashes_for_gaps():
    table = markdown_table([{"a": "1", "b": "2"}, {"a": "3"}])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | - |"]


@pytest.mark.parametrize("noisy", [True, False])
def test_a_page_warns_of_a_busy_machine(noisy: bool):
    text = document("title", {**hardware(), "noisy": noisy}, "command", ["part"])
    assert ("times are noisy" in text) == noisy
    assert text.endswith("\n\n`command`\n\npart\n")
