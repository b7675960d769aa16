"""Scores and losses against formulas written out here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from l2l.models import heads
from l2l.models.batching import Grouping
from l2l.models.shapes import tiny_random
from l2l.tasks.encode import Encoded, EncodedOption, Form, collate
from l2l.tasks.losses import BatchLogits, batch_loss, classification_loss, gold_token_sum, lm_loss, option_scores, predictions


def example(prompt: tuple[int, ...], *options: tuple[int, ...], gold: int = 0) -> Encoded:
    return Encoded(tuple(EncodedOption(prompt + option, len(option)) for option in options), (gold,))


EXAMPLES = [
    example((5, 6, 7), (8,), (9,), gold=1),
    example((11, 12), (13, 14, 15), (16,), (17, 18)),
    example((3, 4, 5, 6, 7, 8), (1, 2), (1, 3), gold=1),
]


def naive_scores(model: torch.nn.Module, encoded: Encoded) -> list[float]:
    """One forward pass per option over all its tokens, full logits."""
    scores = []
    for option in encoded.options:
        ids = torch.tensor([option.ids])
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(option.ids) - option.length
        picked = [logprobs[place - 1, option.ids[place]].item() for place in range(start, len(option.ids))]
        scores.append(sum(picked) / len(picked))
    return scores


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_random("llama", initializer_range=0.3)


def read(model: torch.nn.Module, form: Form = "classification"):
    from l2l.models.heads import token_logprobs

    batch = collate(EXAMPLES, form, 0)
    with torch.no_grad():
        return batch, token_logprobs(model, batch)


def test_scores_equal_one_forward_pass_per_option(model):
    batch, logprobs = read(model)
    expected = [score for encoded in EXAMPLES for score in naive_scores(model, encoded)]
    assert len(batch.input_ids) < len(expected)
    torch.testing.assert_close(option_scores(logprobs, batch), torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_classification_loss_is_the_mean_cross_entropy_over_each_examples_options(model):
    batch, logprobs = read(model)
    per_example = []
    for encoded in EXAMPLES:
        scores = naive_scores(model, encoded)
        per_example.append(math.log(sum(map(math.exp, scores))) - scores[encoded.gold[0]])
    loss = classification_loss(option_scores(logprobs, batch), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(per_example) / 3, abs=1e-5)
    with torch.no_grad():
        assert batch_loss(model, batch, "classification").item() == loss.item()


def test_the_lm_loss_is_the_mean_over_all_gold_tokens(model):
    golds = [encoded.options[encoded.gold[0]] for encoded in EXAMPLES]
    means = [naive_scores(model, encoded)[encoded.gold[0]] for encoded in EXAMPLES]
    lengths = [gold.length for gold in golds]
    expected = -sum(mean * length for mean, length in zip(means, lengths, strict=True)) / sum(lengths)
    for batch, logprobs in (read(model, "lm"), read(model, "classification")):
        assert lm_loss(logprobs, batch).item() == pytest.approx(expected, abs=1e-5)
    batch, logprobs = read(model, "classification")
    assert gold_token_sum(logprobs, batch)[1].item() == 1 + 3 + 2


def test_the_loss_by_hand_for_unequal_option_counts():
    batch = collate([example((5,), (1,), (2,)), example((6,), (1,), (2,), (3,), gold=2)], "classification", 0)
    scores = torch.log(torch.tensor([0.2, 0.6, 0.1, 0.1, 0.2]))
    assert classification_loss(scores, batch).item() == pytest.approx(-(math.log(0.25) + math.log(0.5)) / 2, abs=1e-6)
    assert predictions(scores, batch).tolist() == [1, 2]


def test_a_nan_is_not_masked():
    batch = collate([example((5,), (1,), (2, 3)), example((6,), (1,), (2,))], "classification", 0)
    logprobs = torch.tensor([-1.0, float("nan"), -1.0, -2.0, -1.0])
    scores = option_scores(logprobs, batch)
    assert scores.isnan().tolist() == [False, True, False, False]
    assert classification_loss(scores, batch).isnan()


def test_an_impossible_wrong_option_does_not_disturb_the_lm_loss():
    batch = collate([example((5,), (1,), (2,))], "classification", 0)
    assert lm_loss(torch.tensor([-1.5, -torch.inf]), batch).item() == 1.5


@pytest.mark.parametrize("form", ["classification", "lm"])
def test_the_loss_is_differentiable(model, form):
    batch = collate(EXAMPLES, form, 0)
    loss = batch_loss(model, batch, form)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert sum(gradient.norm() for gradient in gradients) > 0
    # A step against the gradient lowers the loss by about lr * |g|^2.
    squared = sum(gradient.square().sum().item() for gradient in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(gradient, alpha=1e-4)
        lower = batch_loss(model, batch, form)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.add_(gradient, alpha=1e-4)
    assert loss.item() - lower.item() == pytest.approx(1e-4 * squared, rel=0.1)


@pytest.mark.parametrize("form", ["classification", "lm"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_cross_entropy_of_the_logits_that_are_returned_is_the_loss(model, form: Form, groups: int):
    batch = collate(EXAMPLES, form, 0)
    batch = replace(batch, parts=Grouping(groups).split(batch))
    assert bool(batch.parts) == (groups > 1)
    closure = BatchLogits(model, batch, form, top=4)
    with torch.no_grad():
        first, again = closure(), closure()
        loss = batch_loss(model, batch, form)
    torch.testing.assert_close(functional.cross_entropy(*first), loss, atol=1e-6, rtol=0)
    assert torch.equal(first[0], again[0])
    width = 3 if form == "classification" else 6  # the right token, four likeliest others, and the rest
    assert first[0].shape == (len(first[1]), width)
    assert first[0].requires_grad is False


def test_the_tokens_of_an_answer_are_chosen_at_the_first_evaluation(model):
    closure = BatchLogits(model, collate(EXAMPLES, "lm", 0), "lm", top=4)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        before = closure()[0]
        head.mul_(-1.0)  # now the least likely tokens are the likeliest
        after, fresh = closure()[0], BatchLogits(model, closure.batch, "lm", top=4)()[0]
        head.mul_(-1.0)
    torch.testing.assert_close(after[:, :-1], -before[:, :-1])
    assert (fresh[:, 1] > after[:, 1]).all()
    losses = [functional.cross_entropy(logits, torch.zeros(len(logits)).long()) for logits in (after, fresh)]
    torch.testing.assert_close(*losses)


@pytest.fixture
def frozen(monkeypatch):
    """A model that trains all but its head, which counts as large."""
    monkeypatch.setattr(heads, "LAYER", 0)
    model = tiny_random("llama", initializer_range=0.3, tie_word_embeddings=False)
    model.get_output_embeddings().requires_grad_(False)
    return model


def moved(model: torch.nn.Module, distance: float) -> None:
    """Add ``distance`` times a fixed direction to what is trained."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += distance * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("form", ["classification", "lm"])
@pytest.mark.parametrize("groups", [1, 3])
def test_near_the_first_evaluation_the_rest_of_the_vocabulary_is_linear(frozen, form: Form, groups: int):
    batch = collate(EXAMPLES, form, 0)
    batch = replace(batch, parts=Grouping(groups).split(batch))
    errors = []
    for distance in (0.02, 0.01):
        exact, near = BatchLogits(frozen, batch, form, top=4), BatchLogits(frozen, batch, form, top=4, near=True)
        calls: list[object] = []
        with torch.no_grad():
            torch.testing.assert_close(near()[0], exact()[0], atol=2e-5, rtol=0)
            moved(frozen, distance)
            with frozen.get_output_embeddings().register_forward_hook(lambda *call: calls.append(call)):  # noqa: B023
                found = near()[0]
            expected = exact()[0]
            moved(frozen, -distance)
        assert calls == [], "the head is not called"
        if form == "lm":
            torch.testing.assert_close(found[:, :-1], expected[:, :-1], atol=1e-5, rtol=0)
        finite = expected.isfinite()
        assert torch.equal(found[~finite], expected[~finite])
        errors.append((found - expected)[finite].abs().max().item())
    assert errors[0] == pytest.approx(4 * errors[1], rel=0.3), "what is left out is of second order"
    assert errors[1] > 1e-5


def test_a_rest_is_linear_only_where_the_logits_are_a_product_with_a_frozen_head(frozen, monkeypatch):
    batch = collate(EXAMPLES, "lm", 0)
    capped = tiny_random("gemma2", initializer_range=2.0, tie_word_embeddings=False)
    capped.get_output_embeddings().requires_grad_(False)
    trained = tiny_random("llama", initializer_range=0.3)
    for model in (capped, trained):
        exact, near = BatchLogits(model, batch, "lm", top=4), BatchLogits(model, batch, "lm", top=4, near=True)
        with torch.no_grad():
            near(), exact()
            moved(model, 0.02)
            assert torch.equal(near()[0], exact()[0])
    near, exact = BatchLogits(frozen, batch, "lm", top=4, near=True), BatchLogits(frozen, batch, "lm", top=4)
    with torch.no_grad():
        near(), exact()
        moved(frozen, 0.02)
    assert torch.equal(near()[0], exact()[0]), "with gradients on, everything is exact"
    monkeypatch.setattr(heads, "LAYER", 12)
    near, exact = BatchLogits(frozen, batch, "lm", top=4, near=True), BatchLogits(frozen, batch, "lm", top=4)
    with torch.no_grad():
        near(), exact()
        moved(frozen, 0.02)
        assert torch.equal(near()[0], exact()[0]), "a head that is smaller than a layer costs little"


@pytest.mark.parametrize("form", ["classification", "lm"])
def test_while_a_trained_head_stands_still_the_rest_is_linear_and_else_all_is_computed(frozen, form: Form):
    head, batch, errors, displaced = frozen.get_output_embeddings(), collate(EXAMPLES, form, 0), [], []
    head.requires_grad_(True)
    for distance in (0.02, 0.01):
        exact = BatchLogits(frozen, batch, form, top=4)
        near = BatchLogits(frozen, batch, form, top=4, near=True, head_displaced=lambda: bool(displaced))
        calls: list[object] = []
        with torch.no_grad():
            torch.testing.assert_close(near()[0], exact()[0], atol=2e-5, rtol=0)
            moved(frozen.model, distance)
            with head.register_forward_hook(lambda *call: calls.append(call)):  # noqa: B023
                found = near()[0]
            expected = exact()[0]
            moved(head, distance)
            displaced.append(head)
            assert torch.equal(near()[0], exact()[0])
            displaced.clear()
            moved(head, -distance)
            moved(frozen.model, -distance)
        assert calls == [], "the head is not called"
        finite = expected.isfinite()
        errors.append((found - expected)[finite].abs().max().item())
    assert errors[0] == pytest.approx(4 * errors[1], rel=0.3), "what is left out is of second order"
    assert errors[1] > 1e-5


def test_a_trained_head_of_half_precision_is_computed_whole(monkeypatch):
    monkeypatch.setattr(heads, "LAYER", 0)
    model, batch = tiny_random("llama", initializer_range=0.3).bfloat16(), collate(EXAMPLES, "lm", 0)
    exact = BatchLogits(model, batch, "lm", top=4)
    near = BatchLogits(model, batch, "lm", top=4, near=True, head_displaced=lambda: False)
    with torch.no_grad():
        assert torch.equal(near()[0], exact()[0])
        moved(model, 0.02)
        assert torch.equal(near()[0], exact()[0])
