"""Lists, differences and heat maps of tuners."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cases import TiedLM
from torch import nn

from l2l.tuners import sources as registry
from l2l.tuners.api import Tuner
from l2l.tuners.card import brief
from l2l.tuners.diagnostics import draw_heatmap, heatmap, heatmap_table, layer_and_kind
from l2l.tuners.inspect import config_changes, difference, distance
from l2l.tuners.model import Provenance
from l2l.tuners.sources import tuner_rows


def made(seed: int = 0) -> Tuner:
    return Tuner.for_model(TiedLM(), "table", seed=seed, provenance=Provenance("me/tied", recipe={"seed": seed}))


def test_a_tuner_does_not_differ_from_itself():
    found = difference(made(), made())
    assert (found.distance, found.config, found.changes) == (0.0, [], [])
    assert found.blocks == "exact: names and shapes are the same"


def test_differences_name_the_fields_and_the_blocks_the_largest_first():
    first, second = made(0), made(1)
    with torch.no_grad():
        second.network.get_parameter("log_sigma")[2] += math.log(3.0)
        second.network.get_parameter("log_sigma")[4] -= math.log(5.0)
    found = difference(first, second)
    names = first.fingerprint.names
    assert [row["block"] for row in found.changes] == [names[4], names[2]]
    assert found.changes[0]["ratio"] == pytest.approx(0.2)
    assert found.changes[1]["ratio"] == pytest.approx(3.0)
    assert {"field": "recipe.seed", "first": "0", "second": "1"} in found.config
    assert difference(first, second, most=1).changes == found.changes[:1]
    assert {row["kind"] for row in found.sigma} >= {"all"}


def test_distance_is_relative_and_there_is_none_between_networks_of_other_shapes():
    first, second = (Tuner.for_model(TiedLM(), hidden=4) for _ in range(2))
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.mul_(1.5)
    assert distance(first, second) == pytest.approx(0.5)
    assert distance(first, Tuner.for_model(TiedLM(), hidden=5)) is None
    found = difference(first, Tuner.for_model(nn.Linear(3, 3)))
    assert found.distance is None
    assert found.blocks.startswith("other family")


def test_fields_that_only_one_has_are_shown():
    assert config_changes({"a": {"b": 1}, "c": 2}, {"c": 2, "d": {"e": 3}}) == [
        {"field": "a.b", "first": "1", "second": "-"},
        {"field": "d.e", "first": "-", "second": "3"},
    ]


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("L2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    return tmp_path


def test_the_list_says_of_every_tuner_whether_it_is_here(apart: Path):
    found = {row["name"]: row for row in tuner_rows()}
    assert found["l2l-tiny"] == {
        "name": "l2l-tiny",
        "where": "bundled",
        "base model": "l2l/tiny",
        "blocks": "38",
        "size": "67 KiB",
        "licence": "MIT",
        "results": brief(Tuner.from_pretrained("l2l-tiny").provenance.results),
    }
    assert (found["zoft-opt-30b"]["where"], found["zoft-opt-30b"]["blocks"]) == ("remote", "772")
    assert found["zoft-opt-30b"]["licence"] == "unknown"
    entry = registry.find("zoft-opt-30b")
    assert entry is not None
    made().save_pretrained(apart / "cache" / "tuners" / f"zoft-opt-30b-{entry.sha256[:12]}")
    again = {row["name"]: row for row in tuner_rows()}["zoft-opt-30b"]
    assert (again["where"], again["blocks"]) == ("cached", str(len(made().fingerprint.names)))


def test_the_list_reads_no_weights_and_opens_no_connection(apart: Path, monkeypatch: pytest.MonkeyPatch):
    entry = {"hub": "me/t", "revision": "a" * 40, "sha256": "0" * 64, "base_model": "me/m", "licence": "MIT"}
    (apart / "r.json").write_text(json.dumps({"registry_version": 1, "tuners": {"mine": entry}}))
    monkeypatch.setenv(registry.VARIABLE, str(apart / "r.json"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    assert {row["name"]: row["where"] for row in tuner_rows()}["mine"] == "remote"


def test_a_heat_map_has_every_block_at_its_layer_and_kind(tmp_path: Path):
    tuner = Tuner.from_pretrained("l2l-tiny")
    found = heatmap(tuner)
    assert len([v for row in found.values for v in row if not math.isnan(v)]) == len(tuner.fingerprint.names)
    assert layer_and_kind("model.layers.12.mlp.up_proj.weight") == ("12", "mlp.up_proj.weight")
    assert layer_and_kind("lm_head.weight") == ("-", "lm_head.weight")
    assert draw_heatmap(found, tmp_path / "new" / "heat.png", "l2l-tiny").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["heat.png"]
    assert heatmap_table(found).row_count == len(found.kinds)
