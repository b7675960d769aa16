"""The script that says where progress lies: its formula, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "block_progress.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("block_progress", SCRIPT)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["block_progress"] = module
    spec.loader.exec_module(module)
    return module


def test_the_gain_does_not_know_the_scale_and_no_mixture_beats_the_best_block(script: Any):
    draw = torch.Generator().manual_seed(0)
    signal, noise, trace = torch.rand(3, 7, generator=draw, dtype=torch.float64)
    figures = script.Figures(signal, signal + noise, trace, 1.0)
    energies = torch.rand(7, generator=draw, dtype=torch.float64)
    assert figures.gain(3 * energies) == pytest.approx(figures.gain(energies))
    alone = [figures.gain(row) for row in torch.eye(7, dtype=torch.float64)]
    assert figures.gain(energies) <= max(alone)
    assert script.Figures(-signal, signal, trace, 1.0).gain(energies) == 0.0


def test_the_script_measures_every_task_and_point(script: Any, tmp_path: Path):
    options = ["--tasks", "world_topic", "--points", "0", "2", "--batches", "2", "--batch_size", "4"]
    result = script.main([*options, "--out", str(tmp_path)])
    assert [(one["task"], one["point"]) for one in result["found"]] == [("world_topic", 0), ("world_topic", 2)]
    for one in result["found"]:
        assert len(one["signal"]) == len(one["noisy"]) == len(one["trace"]) == len(result["blocks"])
        assert min(one["noisy"]) >= 0 and min(one["trace"]) >= 0
        assert len(one["gain_of_role"]) == 11
    assert json.loads((tmp_path / "block_progress.json").read_text())["blocks"] == result["blocks"]
