"""Loading models and tokenizers, and what happens when that fails."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from l2l.models.load import ModelIdentity, context_length, load_model, load_tokenizer, model_identity
from l2l.models.shapes import tiny_random


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_random("llama").save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def offline(monkeypatch, tmp_path: Path) -> None:
    """No network, and an empty cache: set where huggingface_hub reads them, since it reads the environment once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_directory_loads_in_eval_mode_and_float32(saved):
    model = load_model(saved)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model_identity(model) == ModelIdentity(str(saved), None)


def test_the_dtype_is_as_asked_whatever_the_checkpoint_holds(tmp_path):
    tiny_random("llama").bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(str(tmp_path), dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8'; use one of float32, fp32"):
        load_model(tmp_path, dtype="int8")


def test_the_attention_implementation_is_passed_on(saved):
    assert load_model(saved, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_tokenizer_without_padding_pads_with_end_of_text(saved):
    tokenizer = load_tokenizer(saved)
    assert tokenizer.pad_token == "<end>"


def test_a_model_built_in_memory_has_no_identity():
    assert model_identity(tiny_random("gpt2")) == ModelIdentity("", None)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_is_not_there_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory '.*nowhere'; give an existing directory or an id"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no directory '\./nowhere'"):
        load("./nowhere")


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory '.*' has no config\.json"):
        load_model(tmp_path)


def test_a_directory_without_weights_or_tokenizer_is_one_line(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="cannot read the model in directory") as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_weights_is_refused_instead_of_filled_with_noise(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM, .*'model\.layers\.1\.mlp\.up_proj"):
        load_model(saved)


def test_foreign_code_is_never_run(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "alien", "auto_map": {"AutoConfig": "alien.Config", "AutoModelForCausalLM": "alien.Model"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "alien.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ValueError, match="cannot load the model") as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_offline_and_not_cached_says_what_to_download(load, offline):
    with pytest.raises(FileNotFoundError, match="run `hf download someone/absent-model` where there is") as caught:
        load("someone/absent-model")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_embedded_model_loads_under_its_own_name():
    model, tokenizer = load_model("l2l/tiny"), load_tokenizer("l2l/tiny")
    assert model_identity(model) == ModelIdentity("l2l/tiny", None)
    assert len(tokenizer) <= model.config.vocab_size


def test_the_context_is_what_the_model_allows():
    model = tiny_random("gpt2")
    assert context_length(model) == 256
    assert context_length(model, 100) == 100
    assert context_length(tiny_random("llama", max_position_embeddings=9000)) == 2048
    with pytest.raises(ValueError, match=r"max_length 300 must lie in 2\.\.256"):
        context_length(model, 300)


def test_truncated_weights_are_one_clear_error(tmp_path: Path):
    tiny_random("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot load the model"):
        load_model(tmp_path)
