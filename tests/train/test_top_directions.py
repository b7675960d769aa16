"""Directions of the last layer alone: their passes run it alone, give the losses of whole passes, or are refused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import same_bits
from train.test_prefix_run import SMALL, fine_tune, weights

import l2l
from l2l.models import heads
from l2l.models.load import load_model, load_tokenizer
from l2l.train import prefix
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import prepare_fine_tuning

TOP: dict[str, Any] = {
    "method": "rsgn",
    "num_directions": 2,
    "method_args": {"top_directions": 3},
    "lr": 1.0,
    "train_layers": "all",
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_layers": "top:3"},  # whose states below are kept for the whole run as well
        {"micro_batch": 2},
        {"dtype": "bf16"},
        {"method": "learned+rsgn", "tuner": "l2l-tiny", "method_args": {"rsgn": {"top_directions": 3}}},
        {"task": "world_where"},
        {"scheme": "lora"},
    ],
    ids=str,
)
def test_directions_of_the_last_layer_run_it_alone_and_give_the_losses_of_whole_passes(options, tmp_path):
    config = FineTuneConfig(out=str(tmp_path), **{**SMALL, **TOP, **options})
    plain, shared = (prepare_fine_tuning(replace(config, prefix_cache="off")), prepare_fine_tuning(config))
    assert shared.closures.states is not None
    calls: list[int] = []
    layers = next(module for name, module in shared.model.named_modules() if name.endswith("layers"))
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    with nullcontext() if shared.prefix is None else shared.prefix.cache.attached():
        for step in range(2):
            plain.optimizer.step(replace(plain.closures, states=None).at(step))
            calls.clear()
            shared.optimizer.step(shared.closures.at(step))
            parts = calls.count(0)
            assert calls.count(0) * 2 == calls.count(len(layers) - 1) > 0, "3 of 6 passes are of the last layer alone"
            assert plain.optimizer.report.evaluations == pytest.approx(shared.optimizer.report.evaluations, rel=1e-5)
            assert parts % 3 == 0
    pairs = zip(plain.optimizer.blocks, shared.optimizer.blocks, strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.tensor, other.tensor, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_the_embedding_is_computed_only_where_it_is_displaced(monkeypatch, tmp_path):
    monkeypatch.setattr(heads, "LAYER", 0)  # as where the vocabulary is large beside the width
    config = FineTuneConfig(out=str(tmp_path), **{**SMALL, **TOP, "task": "world_where"})
    plain, shared = (prepare_fine_tuning(config), prepare_fine_tuning(config))
    head = shared.model.get_output_embeddings()
    assert head.weight is shared.model.get_input_embeddings().weight
    calls: list[object] = []
    head.register_forward_hook(lambda *call: calls.append(call))
    plain.optimizer.step(replace(plain.closures, head_displaced=None).at(0))
    shared.optimizer.step(shared.closures.at(0))
    assert len(calls) == 3, "at theta, and along the two directions of all layers"
    frozen = prepare_fine_tuning(replace(config, train_layers="top:3"))
    assert frozen.closures.head_displaced is None, "a frozen one stands still along these, too"
    reports = [context.optimizer.report.evaluations for context in (plain, shared)]
    exact, found = ([loss - losses[0] for loss in losses[1:]] for losses in reports)
    assert found[:2] == pytest.approx(exact[:2], abs=5e-6) and found[2:] == pytest.approx(exact[2:], rel=0.02)


def test_a_run_with_directions_of_the_last_layer_is_rebuilt_from_its_log(tmp_path):
    whole = fine_tune(tmp_path, **TOP, save="log")
    assert whole.summary["passes"] == 6 * 6
    rebuilt = l2l.load_model("l2l/tiny", log=str(tmp_path))
    assert same_bits(dict(rebuilt.named_parameters()), weights(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "accuracy"}, "objective is 'accuracy': leave top_directions at 0"),
        ({"compile": True}, "which a compiled decoder cannot: leave compile off"),
        ({"train_layers": "0", "freeze": "norm"}, "nothing of it is trained: leave top_directions at 0"),
        ({"model": "opt"}, "has no list of layers: leave top_directions at 0"),
    ],
)
def test_directions_of_a_last_layer_that_cannot_be_run_alone_are_refused(options, message, monkeypatch, tmp_path):
    config = FineTuneConfig(out=str(tmp_path / "out"), **{**SMALL, **TOP, **{k: v for k, v in options.items() if k != "model"}})
    if "model" in options:
        monkeypatch.setattr(prefix.prefix, "layer_list", lambda model: None)
    with pytest.raises(ValueError, match=message):
        prepare_fine_tuning(config)
    assert not (tmp_path / "out").exists()


def test_directions_of_a_last_layer_that_needs_more_than_hidden_states_are_refused(tmp_path):
    model = load_model("l2l/tiny")
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(args[2]))
    model.model.layers[3].register_forward_hook(lambda *args: args[2] + seen[-1].mean())  # of the last pass that ran it
    config = FineTuneConfig(out=str(tmp_path / "out"), **{**SMALL, **TOP})
    with pytest.raises(ValueError, match=r"gives other losses without its lower layers \(.*: leave top_directions at 0"):
        prepare_fine_tuning(config, model, load_tokenizer("l2l/tiny"))
