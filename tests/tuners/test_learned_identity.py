"""A freshly learned tuner knows its model: exact of it, derivative of a changed copy; its content hash does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import l2l
from l2l.cli import main
from l2l.experiments.spec import fingerprint, freeze
from l2l.models.load import load_model, load_tokenizer
from l2l.models.shapes import tiny_random
from l2l.tuners import io as store
from l2l.tuners.api import Tuner
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.io import bundled_folder
from l2l.tuners.sources import locate

SMALL: dict[str, Any] = {"steps": 2, "batch_size": 2, "train_size": 8, "dev_size": 4, "progress": False}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a changed copy of it, and a tuner that was learned for the first."""
    folder, tokenizer = tmp_path_factory.mktemp("places"), load_tokenizer("l2l/tiny")
    model = tiny_random("llama", vocab_size=len(tokenizer))
    for name in ("mymodel", "changed"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
    l2l.meta_train(str(folder / "mymodel"), tasks=["world_topic"], out=str(folder / "tuner"), **SMALL)
    return folder


def test_the_config_says_which_model_it_is_by_name_and_by_weights(places: Path):
    config = json.loads((places / "tuner" / store.CONFIG).read_text())
    known = Fingerprint.of(load_model(str(places / "mymodel")), identity=True)
    assert config["fingerprint"] == {"ties": [], "weights": known.weights}
    assert config["base_model"] == "mymodel"
    assert len(config["weights_sha256"]) == 64


def test_verify_tells_the_model_from_its_derivatives(places: Path, capsys: pytest.CaptureFixture[str]):
    said = {}
    for name in ("mymodel", "changed"):
        assert main(["tuners", "verify", str(places / "tuner"), "--model", str(places / name)]) == 0
        said[name] = next(line for line in capsys.readouterr().out.splitlines() if " blocks " in line[:18])
    assert "exact: all 21 are the model's, names, shapes and weights are the same" in said["mymodel"]
    assert said["mymodel"].startswith("ok ")
    assert "derivative: " in said["changed"]
    assert said["changed"].startswith("warning ")


def test_knowing_its_model_does_not_make_it_another_tuner(places: Path, tmp_path: Path):
    tuner = Tuner.from_pretrained(places / "tuner")
    config = json.loads((places / "tuner" / store.CONFIG).read_text())
    named = freeze(tuner, tmp_path).name
    del config["fingerprint"]
    (places / "tuner" / store.CONFIG).write_text(json.dumps(config))
    assert freeze(Tuner.from_pretrained(places / "tuner"), tmp_path).name == named
    assert fingerprint(tmp_path / named) == named


def test_a_folder_of_the_models_name_does_not_hide_a_bundled_tuner(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "l2l-tiny-ratio").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("l2l-tiny-ratio") == bundled_folder() / "l2l-tiny-ratio"
    Tuner.from_pretrained("l2l-tiny-ratio").save_pretrained("l2l-tiny-ratio")
    assert locate("l2l-tiny-ratio") == Path("l2l-tiny-ratio")
