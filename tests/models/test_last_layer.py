"""Modules of the last layer that are computed at the places alone: which they are, and that they change no number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_heads import examples
from torch import nn

from l2l.models.batching import Grouping
from l2l.models.heads import token_logprobs
from l2l.models.last_layer import modules_at_places
from l2l.models.prefix import layer_list
from l2l.models.schemes import apply_scheme
from l2l.models.shapes import tiny_random
from l2l.tasks.encode import Batch, collate

torch.set_num_threads(1)
NAMES = {
    "llama": ["self_attn.q_proj", "self_attn.o_proj", "mlp"],
    "opt": ["self_attn.q_proj", "self_attn.out_proj"],  # what follows is given all tokens as one long row
    "gpt2": ["attn.c_proj", "mlp"],  # queries, keys and values are one matrix
    "gpt_neox": ["attention.dense", "mlp"],
    "gemma2": ["self_attn.q_proj", "self_attn.o_proj", "mlp"],
    "mistral": ["self_attn.q_proj", "self_attn.o_proj", "mlp"],
    "falcon": ["self_attention.dense", "mlp"],
}


def last_of(model: Any) -> Any:
    layers = layer_list(model)
    assert layers is not None
    return layers[-1]


def found(model: Any) -> list[str]:
    layer = last_of(model)
    prefix = next(name for name, module in model.named_modules() if module is layer)
    return [name.removeprefix(f"{prefix}.") for name in modules_at_places(model, layer)]


def batch_of(model: Any) -> Batch:
    """Rows of unlike length, in parts, of which most tokens are not read."""
    grouping = Grouping(3, at_places=modules_at_places(model, last_of(model)))
    batch = collate([one for one in examples() if len(one.options[0].fed) > 6], "classification", 0, grouping=grouping)
    return replace(batch, parts=grouping.split(batch))


def everywhere(batch: Batch) -> Batch:
    return replace(batch, at_places=(), parts=tuple(replace(part, at_places=()) for part in batch.parts))


@pytest.mark.parametrize("family", NAMES)
def test_queries_and_what_follows_attention_are_needed_at_the_places_alone(family):
    model = tiny_random(family, initializer_range=0.3)
    assert found(model) == NAMES[family]
    batch = batch_of(model)
    assert batch.parts
    for one in (batch, replace(batch, parts=())):
        values = token_logprobs(model, one, one.parts)
        torch.testing.assert_close(values, token_logprobs(model, everywhere(one), everywhere(one).parts), atol=1e-5, rtol=0)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_are_those_of_a_whole_pass():
    model = tiny_random("llama", initializer_range=0.3)
    batch, parameters = batch_of(model), list(model.parameters())
    narrow, whole = (
        torch.autograd.grad(token_logprobs(model, one, one.parts).sum(), parameters) for one in (batch, everywhere(batch))
    )
    for own, other in zip(narrow, whole, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_only_the_places_are_computed():
    model, seen = tiny_random("llama"), []
    batch = batch_of(model)
    last_of(model).mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    token_logprobs(model, batch, batch.parts)
    assert sum(seen) == len(batch.rows) < batch.input_ids.numel() / 2
    seen.clear()
    crowded = replace(batch, parts=(), rows=batch.rows[:1].expand(batch.input_ids.numel()))
    crowded = replace(crowded, positions=torch.zeros_like(crowded.rows))
    token_logprobs(model, crowded)
    assert seen == [batch.input_ids.numel()]  # where most is read, all is computed, in one product


@pytest.mark.parametrize("at_first", [0.0, 1.0])
def test_what_weights_hide_is_found(at_first):
    """Values that do not count yet, and a layer that does not mix its tokens yet, may in the next step."""

    class Mixed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.gate = inner, nn.Parameter(torch.full((1, 1), at_first))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.inner(states) + self.gate * states.cumsum(1)

    model = tiny_random("llama", initializer_range=0.3)
    last_of(model).self_attn.o_proj.weight.data.mul_(at_first)
    assert found(model) == NAMES["llama"]
    last_of(model).mlp = Mixed(last_of(model).mlp)
    assert found(model) == ["mlp.inner"]  # what the sum reads, queries included, is needed everywhere


def test_adapters_stay_inside():
    model = tiny_random("llama", initializer_range=0.3)
    apply_scheme(model, "lora")
    assert found(model) == NAMES["llama"]
    batch = batch_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name.lower():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    values = token_logprobs(model, everywhere(batch), everywhere(batch).parts)
    torch.testing.assert_close(token_logprobs(model, batch, batch.parts), values, atol=1e-5, rtol=0)


def test_a_model_that_cannot_be_tried_is_computed_whole():
    model: Any = tiny_random("llama").train()
    assert found(model) and all(module.training for module in model.modules())
    assert Grouping.of(model).at_places and not Grouping.of(model.to("meta")).at_places
    model = tiny_random("llama")
    last_of(model).register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("not now")))
    assert modules_at_places(model, last_of(model)) == ()
