"""Meta-training with a basis: the run that a configuration asks for, and that it resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_meta_choices import TINY, files

import l2l
from l2l.meta.config import MetaTrainConfig
from l2l.report.files import read_tensors

SMALL = {**TINY, "architecture": "table", "basis_rank": 4, "steps": 3}
CASES: list[dict[str, Any]] = [
    {"basis": "gradients", "normalizer": "curvature", "objective": "expected"},
    {"basis": "activations", "architecture": "per_block_mlp", "block_schedule": "role", "normalizer": "curvature"},
    {
        "basis": "random",
        "objective": "runs",
        "objective_args": {"population": 1, "steps": 2, "tie": "role"},
        "trajectory": "zo",
    },
]


def run(out: Path, **options: Any) -> l2l.Tuner:
    return l2l.meta_train("l2l/tiny", out=str(out), **{**SMALL, **options})


def cut_short(out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that breaks off a step behind its checkpoint."""
    from l2l.meta.module import MetaModule

    original = MetaModule.training_step

    def cut(self: MetaModule, batch: int, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.global_step == 3:
            raise ConnectionAbortedError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(MetaModule, "training_step", cut)
        with pytest.raises(ConnectionAbortedError):
            run(out, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["basis"])
def test_a_run_with_a_basis_broken_off_and_continued_measures_nothing_again(case, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", **case)
    assert whole.basis and {vectors.shape[1] for vectors in whole.basis.values()} == {4}
    assert whole.provenance.recipe["basis"] == case["basis"] and whole.provenance.recipe["basis_rank"] == 4
    assert (whole.block_schedule is not None) == ("block_schedule" in case) == ("turns" in whole.provenance.recipe)
    assert not (tmp_path / "whole" / "measured.pt").exists()
    fresh = l2l.Tuner.for_model(l2l.load_model("l2l/tiny"), whole.architecture, basis=whole.basis).network
    assert any(not torch.equal(a, b) for a, b in zip(whole.network.parameters(), fresh.parameters(), strict=True))

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    cut_short(tmp_path / "cut", monkeypatch, **case)
    assert read_tensors(tmp_path / "cut" / "checkpoint.pt")["global_step"] == 2
    monkeypatch.setattr("l2l.meta.run._measure", again)
    run(tmp_path / "cut", **case)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    loaded = l2l.Tuner.from_pretrained(tmp_path / "cut")
    assert loaded.basis and all(torch.equal(vectors, loaded.basis[name]) for name, vectors in whole.basis.items())


def test_a_run_without_a_basis_is_that_of_a_version_that_knew_none(tmp_path, monkeypatch):
    """Its directory says nothing of a basis, and it goes on where nothing measured was kept."""
    whole = run(tmp_path / "whole", normalizer="curvature")
    assert whole.basis is None
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert not [name for name in config if name.startswith("basis")]
    cut_short(tmp_path / "cut", monkeypatch, normalizer="curvature")
    (tmp_path / "cut" / "measured.pt").unlink()
    run(tmp_path / "cut", normalizer="curvature")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"basis": "gradient"}, "basis='gradient' must be 'none', 'gradients', 'activations' or 'random'"),
        ({"basis_rank": 0}, "basis_rank=0 must be a whole number"),
        ({"basis": "random", "architecture_args": {"outputs": 1}}, "outputs=1, but a basis needs a sigma of its own"),
    ],
)
def test_a_wrong_basis_is_refused_before_anything_is_loaded(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        MetaTrainConfig(**{**TINY, **options})


def test_a_rank_that_no_matrix_is_wide_enough_for_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="basis_rank=4000: no weight matrix"):
        run(tmp_path / "out", basis="random", basis_rank=4000)
    assert not (tmp_path / "out").exists()
