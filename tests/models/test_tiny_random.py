"""Tiny random models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from l2l.models.shapes import like, tiny_random

FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "opt", "gemma2", "gemma3_text", "gpt_neox", "mistral", "phi", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_is_tiny_and_runs(family):
    model = tiny_random(family)
    assert model.config.model_type == family
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    assert model.config.num_hidden_layers == 2
    assert not model.training
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 128)


def test_the_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second, other = tiny_random("llama", 1), tiny_random("llama", 1), tiny_random("llama", 2)
    assert torch.equal(torch.rand(3), expected)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(left, right) for left, right, _ in pairs)
    assert any(not torch.equal(left, right) for left, _, right in pairs)


def test_overrides_win():
    model = tiny_random("opt", hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=3, vocab_size=50)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 3)
    assert model.get_input_embeddings().weight.shape == (50, 16)


def test_a_shrunk_config_keeps_what_is_not_a_size(tmp_path):
    config = AutoConfig.for_model("llama", rms_norm_eps=0.25, tie_word_embeddings=True, num_hidden_layers=40)
    model = like(config)
    assert (model.config.rms_norm_eps, model.config.tie_word_embeddings) == (0.25, True)
    assert model.config.num_hidden_layers == 2
    assert config.num_hidden_layers == 40
    config.save_pretrained(tmp_path)
    assert like(tmp_path).config.rms_norm_eps == 0.25


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="unknown model type 'lama'; use a model_type of transformers"):
        tiny_random("lama")
