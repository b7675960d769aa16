"""Parameters that stay as they are, by name."""

from __future__ import annotations

import re

import pytest
from cases import TiedLM

import l2l
from l2l.meta.config import MetaTrainConfig
from l2l.models.load import freeze_matching, thaw
from l2l.train.config import FineTuneConfig
from l2l.tuners.diagnostics import movement

SMALL = {"train_size": 16, "dev_size": 8, "test_size": 8, "progress": False}


def test_what_the_pattern_finds_is_frozen_and_can_be_thawed():
    model = TiedLM()
    frozen = freeze_matching(model, r"norm\.|out")
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        *("attention.out.weight", "norm.weight", "norm.bias"),
    }
    thaw(frozen)
    assert all(p.requires_grad for p in model.parameters())


def test_thawing_leaves_frozen_what_was_frozen_before():
    model = TiedLM()
    model.norm.requires_grad_(False)
    thaw(freeze_matching(model, "norm|out"))
    assert not model.norm.weight.requires_grad
    assert model.attention.out.weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("nrm", "finds no parameter; names look like 'embed.weight'"), (".", "nothing would be trained")],
)
def test_a_pattern_that_finds_nothing_or_everything_is_refused(pattern: str, message: str):
    model = TiedLM()
    with pytest.raises(ValueError, match=message):
        freeze_matching(model, pattern)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [FineTuneConfig, lambda **given: MetaTrainConfig(model="l2l/tiny", **given)])
def test_what_is_no_regular_expression_is_refused_at_once(make):
    with pytest.raises(ValueError, match=r"freeze='\(' is no regular expression"):
        make(freeze="(")


def test_a_run_leaves_frozen_parameters_as_they_are(tmp_path):
    before = {name: p.clone() for name, p in l2l.load_model("l2l/tiny").named_parameters()}
    found = l2l.fine_tune("l2l/tiny", task="world_topic", steps=3, lr=1e-3, freeze="layernorm", out=str(tmp_path), **SMALL)
    after = dict(found.model.named_parameters())
    assert all((before[name] == after[name]).all() == ("layernorm" in name) for name in before)


def test_meta_training_of_the_top_layers_leaves_sigma_of_the_others_at_its_start(tmp_path):
    model = l2l.load_model("l2l/tiny")
    given = {"steps": 2, "train_size": 16, "progress": False, "train_layers": "top:1", "lr": 1e-4}
    tuner = l2l.meta_train(model, ["world_topic"], str(tmp_path), architecture_args={"start": "mezo"}, **given)
    assert all(p.requires_grad for p in model.parameters())
    assert tuner.provenance.recipe["train_layers"] == "top:1"
    moved = dict(zip(tuner.fingerprint.names, movement(tuner), strict=True))
    last = max(int(found[1]) for name in moved if (found := re.search(r"layers\.(\d+)\.", name)))
    assert {name for name, by in moved.items() if by > 0} == {
        name for name in moved if f"layers.{last}." in name or name == "model.norm.weight"
    }


def test_meta_training_with_frozen_parameters_gives_the_model_back_as_it_was(tmp_path):
    model = l2l.load_model("l2l/tiny")
    tuner = l2l.meta_train(model, ["world_topic"], str(tmp_path), steps=2, freeze="layernorm", train_size=16, progress=False)
    assert all(p.requires_grad for p in model.parameters())
    assert tuner.provenance.recipe is not None
    assert tuner.provenance.recipe["freeze"] == "layernorm"
