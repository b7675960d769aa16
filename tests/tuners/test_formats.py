"""Every kind of tuner comes back from its file; those of version 1 as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cases import TiedLM
from torch import Tensor

import l2l
from l2l.params import Blocks
from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.io import bundled_folder
from l2l.tuners.model import random_basis
from l2l.tuners.normalize import CurvatureNormalizer, EnergyNormalizer, NoNormalizer, Normalizer

BUNDLED = bundled_folder() / "l2l-tiny"


def as_version_1(folder: Path) -> None:
    """Rewrite a config as version 1 had it."""
    config = json.loads((folder / store.CONFIG).read_text())
    del config["features"], config["basis"], config["normaliser"]["name"]
    for block in config["blocks"]:
        del block["kind"]
    (folder / store.CONFIG).write_text(json.dumps(config | {"format_version": 1}))


def paper_sigma(weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """The formula of the paper, as version 1 computed it."""
    hidden = torch.tanh((weights["first_weight"] * features[:, None, :]).sum(-1) + weights["first_bias"])
    return ((weights["second_weight"] * hidden).sum(-1) + weights["second_bias"]).abs()


def test_the_bundled_tuner_is_of_version_1_or_2_and_gives_the_sigma_of_its_weights_bit_for_bit():
    tuner = Tuner.from_pretrained("l2l-tiny")
    if tuner.architecture != "per_block_mlp" or tuner.feature_set != "paper":
        pytest.skip("the bundled tuner is of another architecture")
    model = l2l.load_model("l2l/tiny")
    tuner.check(model)
    blocks = Blocks.of(model)
    history = RunStatistics.start(blocks)
    for plus, minus in ((0.0, 0.0), (2.5, 2.375)):
        raw = torch.empty(len(blocks), 5)
        raw[:, 0:2], raw[:, 2], raw[:, 3], raw[:, 4] = history.moments, plus, minus, 1.0
        seen = tuner.features(RunStatistics(history.sigma, history.moments, plus, minus))
        assert torch.equal(seen, raw)
        wanted = paper_sigma(safetensors.torch.load_file(BUNDLED / store.WEIGHTS), raw)
        assert torch.equal(tuner.sigma(seen, blocks.names), wanted)


def test_a_tuner_of_version_1_loads_with_the_features_and_the_normaliser_it_had(tmp_path: Path):
    model = TiedLM()
    made = Tuner.for_model(model, seed=3, normalizer=EnergyNormalizer(7.0, 4, enabled=False))
    folder = made.save_pretrained(tmp_path)
    as_version_1(folder)
    loaded = Tuner.from_pretrained(folder)
    assert loaded.feature_set == "paper"
    assert loaded.normalizer == EnergyNormalizer(7.0, 4, enabled=False)
    assert loaded.basis is None
    blocks = Blocks.of(model)
    history = RunStatistics.start(blocks)
    assert torch.equal(*(t.sigma(t.features(history), blocks.names) for t in (loaded, made)))
    loaded.check(model)


def test_a_tuner_of_version_1_is_shown_and_saved_as_version_2(tmp_path: Path):
    folder = Tuner.for_model(TiedLM()).save_pretrained(tmp_path / "old")
    as_version_1(folder)
    again = Tuner.from_pretrained(folder).save_pretrained(tmp_path / "new")
    config = json.loads((again / store.CONFIG).read_text())
    assert config["format_version"] == 2
    assert config["normaliser"]["name"] == "energy"
    assert "kinds by shape alone" in (again / store.CARD).read_text()
    Tuner.from_pretrained(again).check(TiedLM())


TRACES = {name: i + 0.1 for i, name in enumerate(Blocks.of(TiedLM()).names)}
KINDS: list[tuple[str, str, Normalizer, dict[str, Any]]] = [
    ("per_block_mlp", "standard", NoNormalizer(), {"hidden": 8}),
    ("shared_mlp", "standard", CurvatureNormalizer(TRACES, TRACES), {"embedding": 3, "start": "random"}),
    ("shared_mlp", "paper", EnergyNormalizer(), {"start": "random"}),
    ("table", "paper", CurvatureNormalizer(TRACES, TRACES), {"start": "random"}),
    ("table", "standard", NoNormalizer(), {"start": "random", "cv": 0.5}),
]


@pytest.mark.parametrize(("architecture", "features", "normalizer", "options"), KINDS)
@pytest.mark.parametrize("rank", [0, 2])
def test_every_kind_of_tuner_gives_the_same_scales_and_factor_after_saving(
    architecture: str, features: str, normalizer: Normalizer, options: dict[str, Any], rank: int, tmp_path: Path
):
    model = TiedLM()
    blocks = Blocks.of(model)
    basis = random_basis(blocks, rank) if rank else None
    made = Tuner.for_model(model, architecture, 1, normalizer, features=features, basis=basis, **options)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.01)
    loaded = Tuner.from_pretrained(made.save_pretrained(tmp_path))
    assert (loaded.normalizer, loaded.feature_set) == (normalizer, features)
    history = RunStatistics.start(blocks).after([0.5] * 6, [[0.1, 0.2]] * 6, [(2.0, 1.0)], [3.0])
    scales, again = (tuner.scales(tuner.features(history), blocks.names) for tuner in (made, loaded))
    assert scales.shape == ((6, 2) if rank else (6,))
    assert torch.equal(scales, again)
    assert made.factor(scales, blocks) == loaded.factor(again, blocks)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_fixed_sigma_of_an_earlier_release_loads_as_a_table_of_its_values(rank: int, tmp_path: Path):
    model = TiedLM()
    basis = random_basis(Blocks.of(model), rank) if rank else None
    folder = Tuner.for_model(model, "table", 1, NoNormalizer(), basis=basis).save_pretrained(tmp_path)
    sigma = torch.tensor([0.5, -2.0, 1e-3, 40.0, 1.0, 3.0])  # its absolute value was taken
    sigma = torch.stack([sigma, 2 * sigma], 1) if rank else sigma
    kept = {name: value for name, value in safetensors.torch.load_file(folder / store.WEIGHTS).items() if name != "log_sigma"}
    safetensors.torch.save_file(kept | {"sigma": sigma}, folder / store.WEIGHTS)
    config = json.loads((folder / store.CONFIG).read_text())
    args = {name: value for name, value in config["architecture_args"].items() if name != "start"} | {"cv": 0.5}
    changed = {
        "architecture": "fixed",
        "architecture_args": args,
        store.SHA256: store.sha256_of(folder / store.WEIGHTS),
    }
    (folder / store.CONFIG).write_text(json.dumps(config | changed))
    loaded = Tuner.from_pretrained(folder)
    assert loaded.architecture == "table"
    scales = loaded.network(torch.zeros(6, 5)).detach()
    torch.testing.assert_close(scales, sigma.abs())
    again = Tuner.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert torch.equal(again.network(torch.zeros(6, 5)), scales)


def test_every_way_to_a_tuner_gives_the_public_class(tmp_path: Path):
    model, made = TiedLM(), l2l.Tuner.for_model(TiedLM(), "table")
    loaded = l2l.Tuner.from_pretrained(made.save_pretrained(tmp_path))
    free = l2l.Tuner.for_model(model, "shared_mlp")
    for tuner in (made, loaded, loaded.matched(model), free.matched(torch.nn.Linear(3, 3)), made.with_basis(None)):
        assert type(tuner) is l2l.Tuner
