"""Our outer steps beside the textbook's: the same losses from the same noise, and a page that says what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from l2l.tools.bench import hardware

ROOT = Path(__file__).parent.parent.parent
TINY = ("--model", "opt-tiny-shape", "--batch_size", "4", "--length", "12", "--threads", "1", "--same_noise")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_meta_training", ROOT / "benchmarks" / "meta.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(script: ModuleType, *options: str) -> Namespace:
    return script.parser().parse_args([*TINY, *options])


@pytest.mark.parametrize("answer", [0, 3])
def test_the_textbook_and_ours_reach_the_same_losses_step_after_step(script: ModuleType, answer: int):
    """Nothing is clipped, which is done differently. Ours rounds the scale of its noise to 12 bits."""
    given = told(script, "--lr", "1e-2", "--clip", "1e6")
    losses = {}
    for name in (script.OWN, script.TEXTBOOK):
        step = script.MAKERS[name](given, answer)
        losses[name] = [step() for _ in range(4)]
    assert losses[script.OWN] == pytest.approx(losses[script.TEXTBOOK], rel=5e-4)
    assert losses[script.OWN][0] != pytest.approx(losses[script.OWN][3], rel=1e-2), "nothing moved"


def test_all_contenders_begin_with_the_same_meta_loss(script: ModuleType):
    given = told(script, "--lr", "1e-2")
    first = [maker(given, 0)() for maker in script.MAKERS.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)


def test_the_page_has_a_row_per_contender_and_the_json_all_rounds(tmp_path: Path):
    out = tmp_path / "meta.md"
    done = subprocess.run(
        [sys.executable, "benchmarks/meta.py", *TINY, "--repeats", "2", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == out.read_text().strip()
    assert out.read_text().startswith(f"# {hardware()['date']}: ")
    rows = [line for line in out.read_text().splitlines() if line.startswith("| all tokens |")]
    assert len(rows) == 3
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["settings"]["model"] == "opt-tiny-shape"
    for one in found["measured"]:
        assert len(one["seconds_by_round"]) == 2
        assert one["seconds"] > 0
        assert one["peak_bytes"] > 0
    assert [one["textbook_over_this"] for one in found["measured"]][2] == 1
