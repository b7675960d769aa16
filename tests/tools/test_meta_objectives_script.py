"""The script that sets meta-objectives beside each other: what its figures mean, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_objectives", ROOT / "benchmarks" / "meta_objectives.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_signal_to_noise_has_the_noise_of_the_mean_taken_off(script: ModuleType):
    draw = torch.Generator().manual_seed(0)
    signal, reference = torch.zeros(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    signal[0] = 3.0
    found = []
    for _ in range(200):
        noisy = [signal + torch.randn(50, generator=draw, dtype=torch.float64) for _ in range(4)]
        samples = script.Samples(noisy, [2.0, 1.0, 3.0, 9.0], passes=5)
        found.append(script.figures(samples, reference))
    assert torch.tensor([one["signal_to_noise"] for one in found]).mean().item() == pytest.approx(9 / 50, rel=0.15)
    assert found[0]["seconds"] == 2.5
    still = script.Samples([signal + 1, signal - 1, signal], [1.0], passes=1)
    assert script.figures(still, signal)["cosine_of_mean"] == pytest.approx(1.0)


def test_an_objective_is_named_with_its_arguments(script: ModuleType):
    assert script.named("expected") == ("expected", {})
    assert script.named('unrolled {"steps": 4}') == ("unrolled", {"steps": 4})


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/meta_objectives.py", "--tiny", "--out", str(out), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )


def test_the_script_prints_a_row_per_objective_and_writes_every_place(tmp_path: Path):
    names = ["expected", 'expected_curvature {"trace": "seen"}', 'evolution {"population": 1, "steps": 1}']
    done = run(tmp_path / "found.json", "--tasks", "world_job", "--objectives", *names)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["objective"] for row in found["summary"]] == names
    assert [row["passes"] for row in found["summary"]] == [8, 14, 8]
    assert [(place["point"], place["objective"]) for place in found["places"]] == [
        (at, n) for at in (0, 2) for n in names
    ]
    assert [place["reference"] for place in found["places"][:3]] == ["first order", "second order", "evolution"]
    assert all(abs(place["cosine"]) <= 1 and place["seconds"] > 0 for place in found["places"])


def test_an_unknown_objective_is_told_before_anything_is_measured(tmp_path: Path):
    done = run(tmp_path / "found.json", "--objectives", "expcted")
    assert done.returncode != 0
    assert "did you mean 'expected'" in done.stderr
    assert not (tmp_path / "found.json").exists()
