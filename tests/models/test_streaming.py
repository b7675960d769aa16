"""A model whose lower layers are read one at a time: the same run, the same model on disk, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits
from safetensors.torch import load_file, save_file

import l2l
from l2l.models.load import load_model, load_tokenizer
from l2l.models.prefix import prefix_identity, trace_layers
from l2l.models.shapes import tiny_random
from l2l.models.streaming import INDEX, SINGLE, LayerFiles, load_streamed
from l2l.train import trainer
from l2l.train.config import FineTuneConfig
from l2l.train.runlog import read_run_log

SMALL: dict[str, Any] = {
    "task": "world_topic",
    "lr": 1e-3,
    "steps": 4,
    "batch_size": 4,
    "train_size": 16,
    "dev_size": 8,
    "test_size": 8,
    "share_prompts": False,
    "progress": False,
    "train_layers": "top:1",
}
FIELDS = {"llama": {"num_hidden_layers": 4}, "opt": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Models of four layers with the embedded tokenizer: one file (tied head), and several."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("l2l/tiny")
    for family, fields in FIELDS.items():
        options: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.3, **fields}
        shards = {"max_shard_size": "100KB"} if family == "llama" else {}
        tiny_random(family, **options).save_pretrained(folder / family, **shards)
        tokenizer.save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("family", FIELDS)
def test_all_but_the_lower_layers_are_in_memory(family, saved):
    assert (saved / family / (INDEX if family == "llama" else SINGLE)).exists()
    model, files = load_streamed(saved / family, "top:1/2")
    whole = dict(load_model(saved / family).named_parameters())
    found = dict(model.named_parameters())
    assert whole.keys() == found.keys()
    lower = {name for entries in files.lower for *_, name in entries}
    assert len(files.lower) == 2
    assert {name for name, parameter in found.items() if parameter.is_meta} == lower
    assert same_bits({n: found[n] for n in found.keys() - lower}, {n: whole[n] for n in whole.keys() - lower})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight or family == "llama"
    with files.resident(1, "cpu"):
        here = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert here == found.keys() - {name for *_, name in files.lower[0]}
        assert same_bits({n: model.get_parameter(n) for n in here}, {n: whole[n] for n in here})
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if name in lower)


@pytest.mark.parametrize("family", FIELDS)
def test_structure_is_seen_although_layers_have_no_weights(family, saved):
    model, _ = load_streamed(saved / family, "top:1")
    places = [trace.places[id(p)] for m in (model,) for trace in (trace_layers(m),) for p in m.parameters()]
    resident = load_model(saved / family)
    trace = trace_layers(resident)
    assert places == [trace.places[id(p)] for p in resident.parameters()]


def test_a_file_made_with_all_layers_in_memory_is_one_made_by_streaming(saved):
    model, files = load_streamed(saved / "llama", "top:1", torch.bfloat16)
    resident = load_model(saved / "llama", dtype="bf16")
    read = prefix_identity(model, trace_layers(model), 3, [], 64, files.tensor)
    assert read == prefix_identity(resident, trace_layers(resident), 3, [], 64)


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("opt", {"prefix_cache": "disk"}), ("gpt2", {"dtype": "bf16", "lr": 1e-2})]
)
def test_a_run_is_the_same_and_leaves_the_same_model(family, options, saved, tmp_path):
    given = {**SMALL, "model": str(saved / family), **options}
    whole = l2l.fine_tune(**given, out=str(tmp_path / "whole"))
    streamed = l2l.fine_tune(**given, stream_layers=True, out=str(tmp_path / "streamed"))
    for name in ("initial_loss", "final_loss", "accuracy", "prefix_cache", "trained_parameters"):
        assert streamed.summary[name] == whole.summary[name]
    assert read_run_log(tmp_path / "whole")[1] == read_run_log(tmp_path / "streamed")[1]
    pair = [dict(load_model(tmp_path / run / "model", dtype="bf16").named_parameters()) for run in ("whole", "streamed")]
    assert same_bits(*pair)
    assert any(parameter.is_meta for parameter in streamed.model.parameters())


def test_a_row_that_is_not_kept_is_an_error_that_says_so(saved, tmp_path, monkeypatch):
    from l2l.models.prefix import plan_fills
    from l2l.train import prefix

    monkeypatch.setattr(prefix, "_planned", lambda inputs, closures, steps: plan_fills(inputs.model, closures.fed(0)))
    with pytest.raises(ValueError, match=r"hidden states are not kept.*leave stream_layers off"):
        l2l.fine_tune(**SMALL, model=str(saved / "opt"), stream_layers=True, out=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_layers": "all"}, r"set train_layers \(top:5\)"),
        ({"prefix_cache": "off"}, "leave prefix_cache on"),
        ({"scheme": "lora"}, "does not go with scheme='lora'"),
        ({"objective": "f1"}, "objective 'f1'"),
    ],
)
def test_options_that_need_all_layers_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FineTuneConfig(**{"train_layers": "top:1", "stream_layers": True, **options})


def test_a_model_in_memory_and_what_is_no_checkpoint_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="one in memory is given: give its directory"):
        l2l.fine_tune(load_model(saved / "opt"), **SMALL, stream_layers=True, out=str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError, match=r"'l2l/nowhere' is none: give one saved by save_pretrained"):
        l2l.fine_tune("l2l/nowhere", **SMALL, stream_layers=True, out=str(tmp_path / "b"))


def test_tensors_of_other_names_are_refused(saved, tmp_path):
    model = load_model(saved / "opt")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file({name.replace("layers.0", "blocks.0"): value for name, value in tensors.items()}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"has no 'model.decoder.layers.0\..*leave stream_layers off, or save the model anew"):
        load_streamed(tmp_path, "top:1")
    (tmp_path / SINGLE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not readable.*download or save it again"):
        load_streamed(tmp_path, "top:1")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "..", ""])
def test_an_index_that_leads_out_of_its_directory_is_refused(name, tmp_path):
    """Kind B4 of issue 16: saving writes files of the names that the index gives."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match="is no file of that directory"):
        LayerFiles(tmp_path)


def test_a_streamed_run_gives_freed_memory_back_after_each_evaluation(saved, tmp_path, monkeypatch):
    given_back: list[str] = []
    monkeypatch.setattr(trainer, "return_freed_memory", lambda: given_back.append("now"))
    whole = SMALL | {"model": str(saved / "llama"), "prefix_cache": "memory"}
    l2l.fine_tune(**whole, out=tmp_path / "resident")
    assert not given_back  # a run with all layers in memory does not pay for it
    l2l.fine_tune(**whole, stream_layers=True, out=tmp_path / "streamed")
    assert len(given_back) >= 3  # dev and train before the first step, and the end
