"""Blocks are read off a model's structure: each trainable memory once, embeddings and attention by what they are."""

from __future__ import annotations

import pytest
import torch
from cases import Attention, TiedLM
from torch import nn

from l2l.models.shapes import tiny_random
from l2l.params import Block, Blocks

FAMILIES = {
    "opt": (("embed_tokens.weight", "embed_positions.weight"), 16),
    "llama": (("embed_tokens.weight",), 8),
    "qwen2": (("embed_tokens.weight",), 14),
    "gpt2": (("wte.weight", "wpe.weight"), 8),
    "gpt_neox": (("embed_in.weight",), 8),
}
"""Endings of the embeddings' names, and how many blocks belong to attention in two layers."""


def test_a_tied_head_is_one_block():
    blocks = Blocks.of(TiedLM())
    assert "embed.weight" in blocks.names
    assert "head.weight" not in blocks.names
    assert blocks.numel == sum(parameter.numel() for parameter in TiedLM().parameters())


def test_memory_shared_by_two_parameters_is_one_block():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    shared = nn.Parameter(model.get_parameter("0.weight").data)
    model[1].register_parameter("weight", shared)
    assert shared is not model.get_parameter("0.weight")
    assert Blocks.of(model).names == ("0.weight",)


def test_frozen_parameters_are_listed_only_when_asked_for():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert Blocks.of(model).names == ("weight",)
    assert Blocks.of(model, trainable=False).names == ("weight", "bias")


def test_a_dtype_without_gradients_is_refused():
    blocks = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"block '1' is torch.complex64, which cannot be trained: freeze it"):
        Blocks.of(blocks)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter: set requires_grad=True"):
        Blocks.of(nn.Linear(2, 2).requires_grad_(False))


def test_a_parameter_that_is_not_contiguous_is_refused():
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.zeros(3, 2).t())
    with pytest.raises(ValueError, match="block 'weight' is not contiguous"):
        Blocks.of(model)


def test_names_must_differ():
    block = Block("w", torch.zeros(1))
    with pytest.raises(ValueError, match="'w' appears more than once"):
        Blocks([block, block])


def test_blocks_are_a_sequence():
    blocks = Blocks.of(TiedLM())
    assert [block.name for block in blocks] == list(blocks.names)
    assert blocks[1:3].names == blocks.names[1:3]
    assert blocks[-1] is list(blocks)[-1]


def test_flat_shares_memory_and_stays_out_of_autograd():
    model = nn.Linear(3, 2)
    flat = Blocks.of(model)[0].flat
    flat.add_(1)
    assert flat.data_ptr() == model.weight.data_ptr()
    assert not flat.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_attention_are_found_by_structure(family: str):
    endings, attention = FAMILIES[family]
    blocks = Blocks.of(tiny_random(family))
    assert tuple(block.name for block in blocks if block.embedding) == tuple(
        name for ending in endings for name in blocks.names if name.endswith(ending)
    )
    found = [block for block in blocks if block.attention]
    assert len(found) == attention
    assert all(".attn." in block.name or "attention" in block.name or "self_attn" in block.name for block in found)
    assert not any(block.embedding for block in found)


def test_an_attention_module_that_is_the_whole_model_marks_nothing():
    attention = Attention(4)
    assert not any(block.attention for block in Blocks.of(attention))
    assert all(block.attention for block in Blocks.of(nn.Sequential(attention, nn.Linear(4, 4)))[:3])


def test_an_embedding_that_is_the_whole_model_is_one():
    assert Blocks.of(nn.Embedding(4, 2))[0].embedding
