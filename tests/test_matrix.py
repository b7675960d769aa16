"""Families of models x tuning schemes x methods, three steps each: losses, what is frozen, and what moves."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from cases import weights
from daily import daily_slice
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

from l2l.methods.base import Method
from l2l.methods.dizo import DiZO
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.models.heads import output_embedding
from l2l.models.kinds import Head, kind_of
from l2l.models.schemes import apply_scheme
from l2l.models.shapes import tiny_random
from l2l.optim import ZOOptimizer
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tasks.encode import Batch, collate, encoder_for
from l2l.tasks.losses import batch_loss
from l2l.tuners.api import Tuner

CAUSAL = ["opt", "llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma", "phi", "gpt_neox", "mixtral"]
OTHERS: list[tuple[str, Head]] = [
    ("roberta", "masked"),
    ("roberta", "classifier"),
    ("bert", "masked"),
    ("bert", "classifier"),
    ("t5", "seq2seq"),
]
MODELS: list[tuple[str, Head]] = [*((family, "causal") for family in CAUSAL), *OTHERS]
SCHEMES = ["full", "lora", "prefix", "prompt"]
METHODS = ["mezo", "dizo", "learned"]
STEPS = 3

CELLS = list(product(MODELS, SCHEMES, METHODS))
DIAGONAL = [(model, SCHEMES[i % len(SCHEMES)], METHODS[i % len(METHODS)]) for i, model in enumerate(MODELS)]
"""Every model, scheme and method at least once: what the default run always takes."""

REFUSED = {(model, scheme) for model in OTHERS for scheme in ("prefix", "prompt")}
"""Models that are not causal and schemes of virtual tokens."""

WORDS = ["the", "film", "was", "good", "bad", "dull", "great", "very", "it"]
ROWS = [{"text": " ".join(WORDS[: 3 + number])} for number in range(3)]
TASK = Task(
    "mine",
    GeneratedData(lambda *_: []),
    ("text",),
    lambda row: Example(row["text"], (" good", " very dull", " bad"), (len(row["text"]) % 3,)),
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<mask>", "<unk>", *WORDS]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", mask_token="<mask>", unk_token="<unk>"
    )


def method_of(name: str, model: nn.Module) -> Method[Any]:
    if name == "learned":
        return Learned(Tuner.for_model(model, seed=1))
    return DiZO(interval=2, iterations=1) if name == "dizo" else MeZO()


def encoded(model: nn.Module) -> Batch:
    encoder = encoder_for(model)
    return collate(encoder.encode(TASK, ROWS, tokenizer(), 60), "classification", encoder.pad_id(tokenizer()))


def cell_name(model: tuple[str, Head], scheme: str, method: str) -> str:
    return "-".join((*model, scheme, method))


@pytest.mark.parametrize(("model", "scheme", "method"), daily_slice(CELLS, 10, DIAGONAL, cell_name))
def test_three_steps_move_what_the_scheme_trains_and_nothing_else(model, scheme, method):
    family, head = model
    base = tiny_random(family, head=head, vocab_size=len(tokenizer()), num_labels=3, pad_token_id=0)
    if (model, scheme) in REFUSED:
        with pytest.raises(ValueError, match=f"scheme '{scheme}' needs a causal language model, but the model is a"):
            apply_scheme(base, scheme)
        return
    adapted = apply_scheme(base, scheme)
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    optimizer = ZOOptimizer(adapted, method_of(method, adapted), lr=1e-2)
    batch, before = encoded(adapted), weights(adapted)
    losses = [optimizer.step(lambda: batch_loss(adapted, batch, "classification")) for _ in range(STEPS)]
    assert all(torch.isfinite(torch.tensor(losses)))
    after = weights(adapted)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trained
    assert (trained == set(before)) == (scheme == "full")


def test_tied_and_untied_heads_and_experts_of_three_dimensions_are_among_the_families():
    models = {family: tiny_random(family) for family in CAUSAL}
    tied = {
        family: getattr(output_embedding(model), "weight", None) is model.get_input_embeddings().weight
        for family, model in models.items()
    }
    assert tied["gpt2"] and tied["opt"] and not tied["llama"] and not tied["mixtral"]
    assert any(parameter.ndim == 3 for parameter in models["mixtral"].parameters())
    assert {kind_of(tiny_random(family, head=head)) for family, head in MODELS} == {
        "causal",
        "masked",
        "classifier",
        "seq2seq",
    }
