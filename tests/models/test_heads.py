"""Log-probabilities at chosen positions equal those from full logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from l2l.models import heads
from l2l.models.batching import Grouping
from l2l.models.heads import token_logits, token_logprobs
from l2l.models.shapes import tiny_random
from l2l.tasks.encode import Batch, Encoded, EncodedOption, collate
from l2l.tasks.losses import batch_loss, classification_loss, option_scores

torch.set_num_threads(1)
FAMILIES = ["llama", "qwen2", "gpt2", "opt", "gemma2", "gpt_neox"]
MORE = ["qwen3", "gemma3_text", "mistral", "phi", "mixtral", "cohere"]


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 128, (count,), generator=generator).tolist())

    shapes = [(5, (1, 1)), (9, (1, 2)), (20, (3, 2, 1))]
    prompts = [(ids(length), lengths) for length, lengths in shapes]
    return [Encoded(tuple(EncodedOption(p + ids(k), k) for k in lengths), (0,)) for p, lengths in prompts]


def from_full_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits.float().log_softmax(-1)[batch.rows, batch.positions][batch.places, batch.targets]


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (True, False)], ids=str)
def model(request):
    family, tied = request.param
    return tiny_random(family, initializer_range=0.3, tie_word_embeddings=tied)


@torch.no_grad()
def test_gathered_logits_equal_full_logits(model):
    batch = collate(examples(), "classification", 0)
    torch.testing.assert_close(token_logprobs(model, batch), from_full_logits(model, batch), atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_and_company_change_nothing(model):
    together = token_logprobs(model, collate(examples(), "classification", 0))
    alone = [token_logprobs(model, collate([one], "classification", 7)) for one in examples()]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_gradients_equal_those_of_full_logits(model):
    batch = collate(examples(), "classification", 0)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(token_logprobs(model, batch).mean(), parameters, allow_unused=True)
    full = torch.autograd.grad(from_full_logits(model, batch).mean(), parameters, allow_unused=True)
    for left, right in zip(ours, full, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


class Probe(nn.Module):
    """Wraps a head and records how many rows and columns it was given."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.shapes = head, []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(hidden.shape[:2]))
        return self.head(hidden)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_the_head_sees_only_the_positions_that_are_read(family):
    model = tiny_random(family)
    probe = Probe(model.get_output_embeddings())
    model.set_output_embeddings(probe)
    batch = collate(examples(), "classification", 0)
    token_logprobs(model, batch)
    places = set(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True))
    assert probe.shapes == [(1, len(places))] and len(places) == len(batch.rows) < len(batch.targets)
    parts = Grouping(3).split(batch)
    assert len(parts) == 3
    token_logprobs(model, batch, parts)
    assert probe.shapes[1:] == [(1, len(places))]


@torch.no_grad()
def test_parts_are_joined_up_to_a_number_of_places(monkeypatch):
    model, batch = tiny_random("llama", initializer_range=0.3), collate(examples(), "classification", 0)
    parts = Grouping(3).split(batch)
    sizes = [len(part.rows) for part in parts]
    expected, shapes = token_logprobs(model, batch), []
    for most, groups in (
        (sum(sizes[:2]), [sizes[:2], sizes[2:]]),
        (sum(sizes) - 1, [sizes[:2], sizes[2:]]),
        (1, [[k] for k in sizes]),
    ):
        monkeypatch.setattr(heads, "JOINED", most)
        with model.get_output_embeddings().register_forward_hook(lambda _, args, __: shapes.append(args[0].shape[:2])):
            found = token_logprobs(model, batch, parts)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert shapes == [(1, sum(some)) for some in groups]
        shapes.clear()


@torch.no_grad()
def test_a_head_that_is_called_twice_is_not_given_the_places_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_random("llama", initializer_range=0.3)
            self.config, self.get_output_embeddings = self.inner.config, self.inner.get_output_embeddings

        def forward(self, **inputs):
            found = self.inner(**inputs)
            found.logits = found.logits + self.inner.lm_head(self.inner.model(**inputs).last_hidden_state.flip(-1))
            return found

    model, batch = Twice(), collate(examples(), "classification", 0)
    expected = from_full_logits(model, batch)
    for parts in ((), Grouping(3).split(batch)):
        torch.testing.assert_close(token_logprobs(model, batch, parts), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_soft_caps_and_scales_still_apply():
    batch = collate(examples(), "classification", 0)
    capped = tiny_random("gemma2", initializer_range=0.3, final_logit_softcapping=0.5)
    free = tiny_random("gemma2", initializer_range=0.3, final_logit_softcapping=None)
    assert (token_logprobs(capped, batch) - token_logprobs(free, batch)).abs().max() > 0.1
    scaled = tiny_random("cohere", initializer_range=0.3, logit_scale=0.01)
    torch.testing.assert_close(token_logprobs(scaled, batch), from_full_logits(scaled, batch), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("answer", [None, "unused"])
def test_a_model_without_a_usable_head_gives_full_logits(monkeypatch, answer):
    model = tiny_random("llama")
    batch = collate(examples(), "classification", 0)
    expected = from_full_logits(model, batch)
    head = None if answer is None else nn.Linear(32, 128)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    for parts in ((), Grouping(3).split(batch)):
        torch.testing.assert_close(token_logprobs(model, batch, parts), expected, atol=1e-5, rtol=0)


def test_the_hook_is_gone_after_an_error(monkeypatch):
    model = tiny_random("llama")
    batch = collate(examples(), "classification", 0)

    def fail(*_, **__):
        raise FloatingPointError("boom")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(FloatingPointError, match="boom"):
        token_logprobs(model, batch)
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(FloatingPointError, match="boom"):
        token_logprobs(model, batch, Grouping(3).split(batch))
    assert not model.lm_head._forward_pre_hooks


@torch.no_grad()
def test_half_precision_models_give_float32():
    model = tiny_random("llama").bfloat16()
    assert token_logprobs(model, collate(examples(), "classification", 0)).dtype == torch.float32


def of_one_token() -> Batch:
    """Three examples of two or three options of one token."""
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, 128, (length,), generator=generator).tolist()) for length in (5, 9, 20)]
    options = [(5, 17), (40, 5, 99), (64, 6)]
    some = [Encoded(tuple(EncodedOption((*p, t), 1) for t in ids), (1,)) for p, ids in zip(prompts, options, strict=True)]
    return collate(some, "classification", 0)


@pytest.fixture
def large_head(monkeypatch):
    """Heads of any size are read at the targets alone."""
    monkeypatch.setattr(heads, "LAYER", 0)


def test_options_of_one_token_need_no_normaliser(model, large_head):
    batch = of_one_token()
    assert batch.one_place and not collate(examples(), "classification", 0).one_place
    parameters = list(model.parameters())
    losses = [
        classification_loss(option_scores(token_logprobs(model, batch, parts), batch), batch)
        for parts in ((), Grouping(3).split(batch))
    ]
    narrow = [batch_loss(model, one, "classification") for one in (batch, replace(batch, parts=Grouping(3).split(batch)))]
    torch.testing.assert_close(torch.stack(narrow), torch.stack(losses), atol=2e-6, rtol=1e-5)
    ours, full = (torch.autograd.grad(loss[0], parameters, allow_unused=True) for loss in (narrow, losses))
    for left, right in zip(ours, full, strict=True):
        if left is not None or right is not None:
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_linear_head_is_read_at_the_targets_alone_and_is_left_as_it_was(large_head):
    model, batch = tiny_random("llama"), of_one_token()
    head, widths = model.get_output_embeddings(), []
    with head.register_forward_hook(lambda _, __, output: widths.append(output.shape)):
        found = token_logits(model, batch)
    assert widths == [(1, len(batch.targets), 1)]
    assert "forward" not in vars(head) and not head._forward_pre_hooks and not head._forward_hooks
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.rows, batch.positions]
    torch.testing.assert_close(found, logits[batch.places, batch.targets], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_that_adds_a_number_per_word_of_the_vocabulary_gets_the_whole_of_it(large_head):
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.bias = tiny_random("llama"), torch.randn(128, generator=torch.Generator().manual_seed(0))
            self.config = self.inner.config

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, **inputs):
            found = self.inner(**inputs)
            found.logits = found.logits + self.bias
            return found

    model, batch = Biased(), of_one_token()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.rows, batch.positions]
    torch.testing.assert_close(token_logits(model, batch), logits[batch.places, batch.targets], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_head_smaller_than_a_layer_computes_the_vocabulary():
    model, batch = tiny_random("llama"), of_one_token()
    head, widths = model.get_output_embeddings(), []
    assert head.out_features <= heads.LAYER * head.in_features
    with head.register_forward_hook(lambda _, __, output: widths.append(output.shape)):
        token_logits(model, batch)
    assert widths == [(1, len(batch.rows), 128)]


@torch.no_grad()
def test_a_model_that_cuts_a_padded_vocabulary_takes_one_forward_pass():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = tiny_random("llama"), 0
            self.config = self.inner.config

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, **inputs):
            self.calls += 1
            found = self.inner(**inputs)
            found.logits = found.logits[..., :120]
            return found

    model, batch = Cut(), of_one_token()
    logits = model.inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[..., :120]
    found = token_logprobs(model, batch)
    expected = logits.log_softmax(-1)[batch.rows, batch.positions][batch.places, batch.targets]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.calls == 1
