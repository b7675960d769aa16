"""A tuner that holds nothing of a block serves models of other sizes and families; one that does, does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM
from torch import nn

import l2l
from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.model import random_basis
from l2l.tuners.normalize import CurvatureNormalizer


def learned(model: nn.Module, **options) -> Tuner:
    """A shared tuner whose sigma differs from block to block."""
    return Tuner.for_model(model, "shared_mlp", features="standard", start="random", **options)


@pytest.mark.parametrize("other", [lambda: TiedLM(40, 16), Quadratic, LogisticRegression])
def test_a_size_free_tuner_learned_on_one_model_steps_on_another(other, tmp_path: Path):
    tuner = Tuner.from_pretrained(learned(TiedLM()).save_pretrained(tmp_path))
    model = other()
    tuner.check(model)
    optimizer = l2l.ZOFineTuner(model, tuner, lr=0.01)
    first = model().item()
    for _ in range(60):
        optimizer.step(model)
    assert model().item() < first
    assert optimizer.report is not None
    assert len(set(optimizer.report.estimates[0].direction.sigma)) > 1


def test_blocks_that_look_alike_get_the_same_sigma_in_any_model():
    small, large = TiedLM(), TiedLM(40, 8)
    tuner = learned(small)
    assert tuner.size_free
    found = []
    for model in (small, large):
        blocks = Blocks.of(model)
        sigma = tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names)
        found.append(sigma[blocks.names.index("norm.weight")])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{"embedding": 2}, None])
def test_what_belongs_to_blocks_is_still_refused_on_other_models(options):
    tuner = Tuner.for_model(TiedLM()) if options is None else learned(TiedLM(), **options)
    assert not tuner.size_free
    with pytest.raises(ValueError, match=r"does not fit this model: blocks \d of another shape"):
        tuner.check(TiedLM(40, 16))


def test_a_size_free_tuner_s_basis_belongs_to_one_model_and_another_can_be_given(tmp_path: Path):
    model, other = TiedLM(), TiedLM(40, 16)
    tuner = learned(model, basis=random_basis(Blocks.of(model), 2))
    tuner.check(model)
    with pytest.raises(ValueError, match=r"basis of block 'attention\.qkv\.weight' has shape \[8, 2\]"):
        tuner.check(other)
    with pytest.raises(ValueError, match=r"that the model does not have: give it one of this model"):
        tuner.check(Quadratic())
    moved = tuner.with_basis(random_basis(Blocks.of(other), 2), other)
    moved.check(other)
    Tuner.from_pretrained(moved.save_pretrained(tmp_path)).check(other)


def test_a_tuner_bound_to_its_blocks_takes_no_basis_of_another_model():
    with pytest.raises(ValueError, match="does not fit this model"):
        learned(TiedLM(), embedding=1).with_basis(None, TiedLM(40, 16))


def test_traces_of_another_model_are_refused_before_the_run():
    model = TiedLM()
    traces = dict.fromkeys(Blocks.of(model).names, 1.0)
    tuner = learned(model, normalizer=CurvatureNormalizer(traces))
    tuner.check(model)
    with pytest.raises(ValueError, match="has no trace of block 'matrix'"):
        tuner.check(Quadratic())


def test_the_card_says_that_a_tuner_is_size_free(tmp_path: Path):
    for tuner, said in ((learned(TiedLM()), True), (learned(TiedLM(), embedding=1), False)):
        card = (tuner.save_pretrained(tmp_path) / "README.md").read_text()
        assert ("serves models of other sizes and families" in card) == said
