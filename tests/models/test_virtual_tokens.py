"""Prefix and prompt tuning through l2l's own forward: the numbers of plain rows with the virtual tokens written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from l2l.models.batching import Grouping, longest_tree
from l2l.models.heads import token_logprobs
from l2l.models.load import load_tokenizer
from l2l.models.schemes import apply_scheme
from l2l.models.shapes import tiny_random
from l2l.params import Blocks
from l2l.tasks.encode import Batch, Encoded, EncodedOption, collate
from l2l.tasks.evaluate import generate

torch.set_num_threads(1)
FAMILIES = ["opt", "llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "bloom"]
COUNT = 4
ARGS = {"num_virtual_tokens": COUNT}
SHAPES = ((5, (1, 1)), (9, (1, 2)), (20, (3, 2, 4)))
"""Tokens of each example's prompt and of its options."""
LONG = ((20, (4, 3, 5, 4, 4)), (12, (4, 4, 4)))


def base(family: str, **options: Any) -> Any:
    return tiny_random(family, **{"initializer_range": 0.3, **options})


def virtual_ids(model: Any, seed: int = 0) -> Tensor:
    """The random tokens whose trace a prefix or prompt begins as."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.get_input_embeddings().num_embeddings, (1, COUNT), generator=generator)


def examples(shapes: Sequence[tuple[int, tuple[int, ...]]] = SHAPES) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 128, (count,), generator=generator).tolist())

    prompts = [(ids(length), lengths) for length, lengths in shapes]
    return [Encoded(tuple(EncodedOption(p + ids(k), k) for k in lengths), (0,)) for p, lengths in prompts]


def written_out(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities from full logits of rows that begin with the virtual tokens."""
    before = virtual_ids(model).expand(len(batch.input_ids), COUNT)
    ids = torch.cat([before, batch.input_ids], 1)
    mask = torch.cat([torch.ones_like(before), batch.attention_mask], 1)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    return logits[batch.rows, batch.positions + COUNT][batch.places, batch.targets]


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_rows_with_the_virtual_tokens_written_out(family, scheme):
    model = base(family)
    batch = collate(examples(), "classification", 0)
    expected = written_out(model, batch)
    adapted = apply_scheme(model, scheme, ARGS)
    found = token_logprobs(adapted, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    parts = Grouping(3).split(batch)
    assert len(parts) > 1
    torch.testing.assert_close(token_logprobs(adapted, batch, parts), expected, atol=1e-5, rtol=0)


def peft_forward(model: Any, batch: Batch, shift: int) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits.float().log_softmax(-1)[batch.rows, batch.positions + shift][batch.places, batch.targets]


@pytest.mark.parametrize(("scheme", "shift"), [("prefix", 0), ("prompt", COUNT)])
@pytest.mark.parametrize("family", FAMILIES)
def test_moved_virtual_tokens_give_the_numbers_and_gradients_of_the_full_logits_of_peft(family, scheme, shift):
    adapted = apply_scheme(base(family), scheme, ARGS)
    weight = Blocks.of(adapted)[0].tensor
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    batch = collate(examples(), "classification", 0)
    ours, full = token_logprobs(adapted, batch), peft_forward(adapted, batch, shift)
    torch.testing.assert_close(ours, full, atol=1e-5, rtol=0)
    (left,), (right,) = (torch.autograd.grad(values.mean(), [weight]) for values in (ours, full))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_options_that_share_a_row_give_the_same_numbers_behind_virtual_tokens(family, scheme):
    model = base(family)
    plain = collate(examples(LONG), "classification", 0)
    expected = written_out(model, plain)
    adapted = apply_scheme(model, scheme, ARGS)
    longest = longest_tree(adapted)
    assert longest == longest_tree(base(family)) - COUNT  # the positions that are left
    shared = collate(examples(LONG), "classification", 0, grouping=Grouping(1, 0, longest))
    assert shared.attention_mask.ndim == 3
    torch.testing.assert_close(token_logprobs(adapted, shared), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "bloom"])
def test_rows_do_not_branch_where_the_base_would_not_read_them_right(family):
    assert longest_tree(apply_scheme(base(family), "prefix", ARGS)) == 0


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_answers_of_unlike_prompts_continue_behind_the_virtual_tokens(family, scheme):
    tokenizer = load_tokenizer("l2l/tiny")
    model = base(family, vocab_size=len(tokenizer))
    prompts = ["The cat sat", "A long story about a dog and", "Why"]
    expected = [greedy(model, tokenizer, prompt, 6) for prompt in prompts]
    adapted = apply_scheme(model, scheme, ARGS)
    assert generate(adapted, tokenizer, prompts, 128, 6) == expected


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """One full forward per token, the virtual tokens written out; up to the first newline or end of text."""
    ids = torch.cat([virtual_ids(model), torch.tensor([tokenizer(prompt)["input_ids"]])], 1)
    given = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    found = ids[0, given:].tolist()
    stop = tokenizer.eos_token_id
    return tokenizer.decode(found[: found.index(stop)] if stop in found else found).split("\n")[0].strip()


@torch.no_grad()
def test_a_prompt_of_words_and_a_projected_prefix_begin_as_peft_has_them():
    tokens = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": COUNT}
    adapted = apply_scheme(base("llama"), "prompt", tokens)
    rows = set(map(tuple, adapted.get_input_embeddings().weight.tolist()))
    assert {tuple(row) for row in Blocks.of(adapted)[0].tensor.tolist()} <= rows
    projected = apply_scheme(base("llama"), "prefix", ARGS | {"prefix_projection": True, "encoder_hidden_size": 8})
    assert len(Blocks.of(projected)) == 5
    batch = collate(examples(), "classification", 0)
    torch.testing.assert_close(token_logprobs(projected, batch), peft_forward(projected, batch, 0), atol=1e-5, rtol=0)
