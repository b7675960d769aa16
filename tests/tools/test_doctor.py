"""``l2l doctor``: it reports every backend and gives one line of advice per problem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from l2l.cli import main
from l2l.noise.dispatch import BACKENDS
from l2l.tools import doctor
from l2l.tools.doctor import advice, equals_reference, examine, serving

pytestmark = pytest.mark.in_turn


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(doctor, "ELEMENTS", 2**17)


def found(**changes) -> dict:
    """What is found on a machine where all is well, but for some changes."""
    machine = {"compiler": "/usr/bin/cc", "cache_folders": ["/a", "/b"], "cuda_devices": [], "noisy": False}
    row = {"device": "cpu", "dtype": "fp32", "backend": "native", "exact": True, "problem": None}
    whole = {"machine": machine, "problems": dict.fromkeys(BACKENDS), "serving": [row]}
    return whole | {name: {**whole[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}


def test_the_command_names_versions_backends_and_folders_and_leaves_a_summary(tmp_path: Path, capsys):
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for word in (
        torch.__version__.partition("+")[0],
        *BACKENDS,
        "reference",
        "bf16",
        "bit for bit",
        "compiler",
        "cache_folders",
    ):
        assert word in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {(row["device"], row["dtype"]) for row in summary["serving"]} >= {("cpu", "fp32"), ("cpu", "bf16")}
    assert all(row["exact"] and row["elements_per_second"] > 0 for row in summary["serving"])
    assert main(["doctor", "--out", str(tmp_path)]) == 2


def test_without_out_it_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", doctor.DTYPES)
def test_the_reference_serves_when_it_is_forced_and_the_doctor_says_so(dtype: str, monkeypatch):
    monkeypatch.setenv("L2L_NOISE", "reference")
    row = serving("cpu", dtype)
    assert (row["backend"], row["exact"]) == ("reference", True)
    assert any("L2L_NOISE=reference forces" in line for line in examine()["advice"])


@pytest.mark.parametrize("forced", ["nonsense", "numba"])
def test_a_forced_backend_that_cannot_run_is_advice_and_not_an_error(forced: str, monkeypatch, capsys):
    monkeypatch.setenv("L2L_NOISE", forced)
    monkeypatch.setattr("l2l.noise.dispatch.backend_problem", lambda name: "it is not here")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "advice: L2L_NOISE=" in said
    assert forced in said


def test_a_backend_with_other_bits_is_found(monkeypatch):
    add_noise = doctor.add_noise

    def wrong(slices, terms, request=None):
        result = add_noise(slices, terms, request)
        slices[0].flat[77] += 1
        return result

    monkeypatch.setattr(doctor, "add_noise", wrong)
    assert not equals_reference("cpu", torch.float32)


def test_all_well_needs_no_advice(monkeypatch):
    monkeypatch.delenv("L2L_NOISE", raising=False)
    assert list(advice(found())) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine": {"compiler": None}, "problems": {"native": "none"}}, "pip install l2l[fast]"),
        ({"problems": {"native": "it failed"}}, "make /a or /b writable"),
        ({"machine": {"cuda_devices": ["H"]}, "problems": {"triton": "no triton"}}, "pip install triton"),
        ({"machine": {"noisy": True, "load_average": 9.0, "cores": 2}}, "load 9.0 on 2 cores"),
        ({"serving": [{**found()["serving"][0], "exact": False}]}, "native differs"),
    ],
)
def test_each_problem_gives_one_line(changes: dict, said: str, monkeypatch):
    monkeypatch.delenv("L2L_NOISE", raising=False)
    lines = list(advice(found(**changes)))
    assert len(lines) == 1
    assert said in lines[0]
    assert "\n" not in lines[0]
