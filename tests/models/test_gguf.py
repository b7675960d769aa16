"""Models in the gguf format: dequantised, they train, save and load like any others."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from cases import same_bits, weights
from hub_cache import add_snapshot, run_offline
from transformers.convert_slow_tokenizer import bytes_to_unicode

import l2l
from l2l import cli
from l2l.costs import config_of
from l2l.models.load import ModelIdentity, load_model, load_tokenizer, model_identity, stored_types
from l2l.models.shapes import tiny_random

pytestmark = pytest.mark.in_turn

LAYERS, HEADS = 2, 4
TOKENS = [*bytes_to_unicode().values(), "Ġt", "<s>", "</s>"]
"""Byte-level: any text is a row of letters."""
SMALL: dict[str, Any] = {
    **{"task": "world_topic", "lr": 1e-2, "steps": 3, "batch_size": 2, "train_size": 8, "dev_size": 4, "test_size": 4},
    "progress": False,
}


@pytest.fixture(scope="module")
def source() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": len(TOKENS), "max_position_embeddings": 512, "num_attention_heads": HEADS, "head_dim": 16}
    return tiny_random("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, **shape).eval()


def write(path: Path, model: Any, quantization: gguf.GGMLQuantizationType) -> Path:
    """Write a Llama as llama.cpp does: matrices quantised, vectors as they are, rotary halves interleaved."""
    config, kind = model.config, gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(TOKENS) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    names = gguf.get_tensor_name_map(kind, LAYERS)
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        for projection, heads in (("q_proj", HEADS), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else quantization
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, gguf.quants.quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", source, gguf.GGMLQuantizationType.F32)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(40).reshape(2, 20)).logits


def test_a_file_in_float32_is_the_model_that_it_was_made_from(plain, source):
    model = load_model(plain)
    assert same_bits(weights(model), weights(source))
    assert torch.equal(logits(model), logits(source))
    assert (model.training, model.dtype, model_identity(model)) == (False, torch.float32, ModelIdentity(str(plain), None))
    assert (config_of(str(plain)).hidden_size, config_of(str(plain)).vocab_size) == (64, len(TOKENS))


@pytest.mark.parametrize(("name", "error"), [("Q8_0", 0.01), ("Q4_1", 0.1)])
def test_a_quantised_file_is_dequantised_and_says_so(name, error, source, tmp_path, caplog):
    path = write(tmp_path / "tiny.gguf", source, gguf.GGMLQuantizationType[name])
    with caplog.at_level(logging.WARNING):
        model = load_model(str(path), dtype="bf16")
    assert [record.message for record in caplog.records] == [f"{path}: dequantised from {name} to bfloat16"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model = load_model(str(path))
    found, expected = weights(model)["model.layers.0.mlp.up_proj.weight"], weights(source)["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < error * expected.norm()
    model.save_pretrained(tmp_path / "saved")
    assert same_bits(weights(load_model(tmp_path / "saved")), weights(model))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_its_tokenizer_comes_from_the_same_file(plain):
    tokenizer = load_tokenizer(plain)
    ids = tokenizer("on the", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([one]) for one in ids] == ["o", "n", " t", "h", "e"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_it_trains_is_saved_and_loads_again(scheme, plain, tmp_path):
    result = l2l.fine_tune(str(plain), scheme=scheme, out=str(tmp_path / "run"), **SMALL)
    assert result.summary["model"] == {"id": str(plain), "revision": None}
    again = load_model(tmp_path / "run" / "model")
    assert torch.allclose(logits(again), logits(result.model), atol=1e-5)
    assert load_tokenizer(tmp_path / "run" / "model")("a")["input_ids"] == load_tokenizer(plain)("a")["input_ids"]


def test_it_is_found_on_the_hub_by_its_repository_and_name(plain, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {"quantised/tiny.gguf": plain.read_bytes()}
    add_snapshot(tmp_path / "hub", "models", "someone/small", commit, files, ("main",))
    name = "someone/small/quantised/tiny.gguf"
    code = f"from l2l.models.load import *; print(model_identity(load_model({name!r})), load_tokenizer({name!r}).eos_token)"
    assert run_offline(tmp_path, code).strip() == f"ModelIdentity(id={name!r}, revision={commit!r}) </s>"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_file_that_is_not_there_is_named(load, tmp_path):
    missing = r"no file '.*absent\.gguf'; give an existing file, or owner/name/file\.gguf of the hub"
    for name in (tmp_path / "absent.gguf", "absent.gguf", "./some/absent.gguf"):
        with pytest.raises(FileNotFoundError, match=missing):
            load(name)
    with pytest.raises(FileNotFoundError, match=r"`hf download someone/small deep/absent\.gguf --revision v2` where") as caught:
        load("someone/small/deep/absent.gguf", revision="v2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "text", "header", "tensors"])
def test_a_damaged_file_is_refused_in_one_line_before_anything_is_written(damage, plain, tmp_path, capsys):
    whole = plain.read_bytes()
    left = {"empty": b"", "text": b"no model at all", "header": whole[:900], "tensors": whole[: len(whole) // 2]}[damage]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(left)
    out = tmp_path / "out"
    assert cli.main(["fine-tune", "--model", str(path), "--task", "world_topic", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert "damaged.gguf' is no whole gguf file (" in said and said.endswith("fetch it again") and "\n" not in said
    assert not out.exists()


def test_a_tensor_type_that_nobody_knows_is_refused(plain, tmp_path):
    path, whole = tmp_path / "other.gguf", bytearray(plain.read_bytes())
    at = whole.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    whole[at : at + 4] = (250).to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is no whole gguf file"):
        load_model(path)


def test_it_cannot_be_quantised_again(plain):
    with pytest.raises(ValueError, match=r"does not go with the gguf file .*: leave it out, or give the directory"):
        load_model(plain, quantize="bnb8")


def test_without_the_package_the_way_out_is_named(plain, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("l2l.models.load.find_spec", lambda name: None if name == "gguf" else there(name))
    with pytest.raises(ValueError, match=r"needs gguf, which is not installed: pip install 'l2l\[gguf\]'"):
        load_model(plain)


def test_types_are_listed_by_coordinates(source, tmp_path):
    assert stored_types(write(tmp_path / "half.gguf", source, gguf.GGMLQuantizationType.F16)) == "F16, F32"
