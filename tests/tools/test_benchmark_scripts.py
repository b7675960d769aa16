"""The scripts of ``benchmarks``: what their figures mean, and that each runs on the smallest model.

They run in this process, which has everything imported; those that start processes of their own are slow tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import document, markdown_table

from l2l.tools.bench import hardware

pytestmark = pytest.mark.in_turn

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def load_script(name: str) -> Any:
    """A script as a module of a name of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def meta() -> Any:
    return load_script("meta")


@pytest.fixture(scope="module")
def objectives() -> Any:
    return load_script("meta_objectives")


@pytest.fixture(scope="module")
def progress() -> Any:
    return load_script("block_progress")


@pytest.fixture(scope="module")
def scales() -> Any:
    return load_script("scale_gain")


@pytest.fixture
def page(monkeypatch, tmp_path, capsys) -> Callable[..., str]:
    """Runs a script that writes a page; the page, which it prints too."""

    def run(module: Any, *options: str) -> str:
        out = tmp_path / "page.md"
        monkeypatch.setattr(sys, "argv", ["script", *options, "--repeats", "1", "--length", "8", "--out", str(out)])
        capsys.readouterr()
        module.main()
        assert capsys.readouterr().out.strip() == out.read_text().strip()
        return out.read_text()

    return run


@pytest.mark.slow
def test_without_cuda_the_gpu_script_measures_a_small_shape_and_says_what_is_missing(page, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = page(load_script("gpu"))
    assert "GPU figures are missing" in text
    assert torch.__version__ in text
    assert text.startswith(f"# {hardware()['date']}: ")
    row = next(line for line in text.splitlines() if line.startswith("| opt-tiny-shape | bf16 |"))
    assert row.endswith("| yes |")
    assert "fp32 yes, bf16 yes" in text


@pytest.mark.slow
def test_the_step_script_has_a_row_per_dtype_and_number_of_threads(page):
    text = page(load_script("step"), "--model", "opt-tiny-shape", "--batch_size", "2", "--threads", "1")
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


def test_the_gain_does_not_know_the_scale_and_no_mixture_beats_the_best_block(progress: Any):
    draw = torch.Generator().manual_seed(0)
    signal, noise, trace = torch.rand(3, 7, generator=draw, dtype=torch.float64)
    figures = progress.Figures(signal, signal + noise, trace, 1.0)
    energies = torch.rand(7, generator=draw, dtype=torch.float64)
    assert figures.gain(3 * energies) == pytest.approx(figures.gain(energies))
    alone = [figures.gain(row) for row in torch.eye(7, dtype=torch.float64)]
    assert figures.gain(energies) <= max(alone)
    assert progress.Figures(-signal, signal, trace, 1.0).gain(energies) == 0.0


def test_block_progress_measures_every_task_and_point(progress: Any, tmp_path: Path):
    options = ["--tasks", "world_topic", "--points", "0", "2", "--batches", "2", "--batch_size", "4"]
    result = progress.main([*options, "--out", str(tmp_path)])
    assert [(one["task"], one["point"]) for one in result["found"]] == [("world_topic", 0), ("world_topic", 2)]
    for one in result["found"]:
        assert len(one["signal"]) == len(one["noisy"]) == len(one["trace"]) == len(result["blocks"])
        assert min(one["noisy"]) >= 0 and min(one["trace"]) >= 0
        assert len(one["gain_of_role"]) == 11
    assert json.loads((tmp_path / "block_progress.json").read_text())["blocks"] == result["blocks"]


TINY = ("--model", "opt-tiny-shape", "--batch_size", "4", "--length", "12", "--threads", "1", "--same_noise")


def told(meta: Any, *options: str) -> Namespace:
    return meta.parser().parse_args([*TINY, *options])


@pytest.mark.parametrize("answer", [0, 3])
def test_the_textbook_and_ours_reach_the_same_losses_step_after_step(meta: Any, answer: int):
    """Nothing is clipped, which is done differently. Ours rounds the scale of its noise to 12 bits, 1e-4 of it, and steps as
    long as these amplify that: by ten in four of them on some processors."""
    given = told(meta, "--lr", "1e-2", "--clip", "1e6")
    losses = {}
    for name in (meta.OWN, meta.TEXTBOOK):
        step = meta.MAKERS[name](given, answer)
        losses[name] = [step() for _ in range(4)]
    assert losses[meta.OWN] == pytest.approx(losses[meta.TEXTBOOK], rel=2e-3)
    assert losses[meta.OWN][0] != pytest.approx(losses[meta.OWN][3], rel=1e-2), "nothing moved"


def test_all_contenders_begin_with_the_same_meta_loss(meta: Any):
    given = told(meta, "--lr", "1e-2")
    first = [maker(given, 0)() for maker in meta.MAKERS.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)


@pytest.mark.slow  # it starts a process for each contender and each measurement of memory
def test_the_meta_page_has_a_row_per_contender_and_the_json_all_rounds(tmp_path: Path):
    out = tmp_path / "meta.md"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "meta.py"), *TINY, "--repeats", "2", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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


def test_signal_to_noise_has_the_noise_of_the_mean_taken_off(objectives: Any):
    draw = torch.Generator().manual_seed(0)
    signal, reference = torch.zeros(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    signal[0] = 3.0
    found = []
    for _ in range(200):
        noisy = [signal + torch.randn(50, generator=draw, dtype=torch.float64) for _ in range(4)]
        samples = objectives.Samples(noisy, [2.0, 1.0, 3.0, 9.0], passes=5)
        found.append(objectives.figures(samples, reference))
    assert torch.tensor([one["signal_to_noise"] for one in found]).mean().item() == pytest.approx(9 / 50, rel=0.15)
    assert found[0]["seconds"] == 2.5
    still = objectives.Samples([signal + 1, signal - 1, signal], [1.0], passes=1)
    assert objectives.figures(still, signal)["cosine_of_mean"] == pytest.approx(1.0)


def test_an_objective_is_named_with_its_arguments(objectives: Any):
    assert objectives.named("expected") == ("expected", {})
    assert objectives.named('unrolled {"steps": 4}') == ("unrolled", {"steps": 4})


def test_meta_objectives_prints_a_row_per_objective_and_writes_every_place(
    objectives: Any, tmp_path: Path, monkeypatch, capsys
):
    names = ["expected", 'expected_curvature {"trace": "seen"}', 'evolution {"population": 1, "steps": 1}']
    options = ["--tiny", "--out", str(tmp_path / "found.json"), "--tasks", "world_job", "--objectives", *names]
    monkeypatch.setattr(sys, "argv", ["meta_objectives.py", *options])
    objectives.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["objective"] for row in found["summary"]] == names
    assert [row["passes"] for row in found["summary"]] == [8, 14, 8]
    assert [(place["point"], place["objective"]) for place in found["places"]] == [(at, n) for at in (0, 2) for n in names]
    assert [place["reference"] for place in found["places"][:3]] == ["first order", "second order", "evolution"]
    assert all(abs(place["cosine"]) <= 1 and place["seconds"] > 0 for place in found["places"])


def test_an_unknown_objective_is_named_before_anything_is_measured(objectives: Any, tmp_path: Path, monkeypatch):
    options = ["--tiny", "--out", str(tmp_path / "found.json"), "--objectives", "expcted"]
    monkeypatch.setattr(sys, "argv", ["meta_objectives.py", *options])
    with pytest.raises(ValueError, match="did you mean 'expected'"):
        objectives.main()
    assert not (tmp_path / "found.json").exists()


def test_a_scale_gains_by_the_share_of_gradient_over_that_of_curvature(scales: Any):
    good, bad = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.ones(2, 2)
    own = {"useful": (good, torch.ones(2, 2)), "idle": (torch.zeros(2, 2), bad)}
    found = scales.gains(own, own)
    assert scales.shares(own) == 4 / 8
    assert found["block, G/F"] == found[scales.ORACLE] == pytest.approx(2.0, rel=0.01)  # all but the floor is in one block
    assert found["element, 1/F^.5"] == pytest.approx(1.0)  # equal curvature everywhere: MeZO
    assert found["mask, top 10.0% by g^2"] == pytest.approx(4 / 6 / (4 / 8))  # ties keep two of one block, and all of the other
    assert scales.mask(0.5, False, good, bad, 0.0).tolist() == good.clamp(max=1).tolist()
    torch.testing.assert_close(scales.row_by_column(good, bad, 0.1), torch.tensor([[2**0.5, 0.1**0.5]] * 2))


def test_scale_gain_measures_every_task_and_point_and_a_basis_after_the_first(scales: Any, tmp_path: Path):
    given = ["--tasks", "world_topic", "world_job", "--points", "0", "2", "--batches", "1", "--batch_size", "4"]
    rows = scales.main([*given, "--out", str(tmp_path)])["rows"]
    assert [(row["task"], row["point"]) for row in rows] == [(t, p) for t in ("world_topic", "world_job") for p in (0, 2)]
    assert all(0 < row["basis: of F"] < 1 for row in rows if row["point"])
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert scales.main([*given, "--out", str(tmp_path)])["rows"] == rows
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}, "nothing is measured twice"
