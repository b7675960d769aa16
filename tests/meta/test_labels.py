"""Labels drawn from the model: their distribution, and the trace that their gradients give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from l2l.meta.labels import sampled_loss
from l2l.meta.statistics import Components, squared_norms
from l2l.models.heads import token_logprobs
from l2l.models.shapes import tiny_random
from l2l.noise import Key
from l2l.params.blocks import Blocks
from l2l.tasks.encode import Batch, Encoded, EncodedOption, Form, collate
from l2l.tasks.losses import classification_loss, option_scores

OPTIONS = ((7, 3), (9,), (11, 4, 2))


def batch_of(form: Form, count: int = 1) -> Batch:
    prompts = [(1 + i, 20, 31, 40 + i) for i in range(count)]
    examples = [
        Encoded(tuple(EncodedOption(prompt + option, len(option)) for option in OPTIONS), (0,)) for prompt in prompts
    ]
    return collate(examples, form, 0)


def model_of() -> PreTrainedModel:
    return tiny_random("llama", hidden_size=16, intermediate_size=24, vocab_size=48, num_hidden_layers=1).float()


def score(model: torch.nn.Module, batch: Batch) -> Tensor:

    return option_scores(token_logprobs(model, batch), batch)


def test_options_are_drawn_as_often_as_the_model_believes_them():
    model, batch = model_of(), batch_of("classification")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # so that the options differ
        scores = score(model, batch)
        losses = torch.tensor(
            [sampled_loss(model, batch, "classification", Key(step)).closure() for step in range(400)]
        )
    believed = torch.softmax(scores, 0)
    for chance, value in zip(believed, -torch.log(believed), strict=True):
        share = torch.isclose(losses, value, rtol=1e-4).float().mean().item()
        assert share == pytest.approx(chance.item(), abs=4 * (0.25 / 400) ** 0.5)


@pytest.mark.parametrize("form", ["classification", "lm"])
def test_a_drawn_loss_says_how_many_labels_it_has_and_is_the_same_under_its_key(form: Form):
    model, batch = model_of(), batch_of(form, 3)
    one, again, other = (sampled_loss(model, batch, form, Key(seed)) for seed in (1, 1, 2))
    assert one.count == (3 if form == "classification" else 3 * len(OPTIONS[0]))
    assert one.closure().item() == again.closure().item()
    assert one.closure().requires_grad
    values = {sampled_loss(model, batch, form, Key(seed)).closure().item() for seed in range(12)}
    assert len(values) > 3 and other.passes == one.passes


def test_the_squared_norm_under_drawn_labels_is_the_gauss_newton_trace_on_average():
    """Against the sum over all labels, weighted by the model's own belief, of one example."""
    model, batch = model_of(), batch_of("classification")
    blocks = Blocks.of(model)
    components = Components(blocks)
    believed = torch.softmax(score(model, batch).detach().double(), 0)
    exact = components.zeros()
    for label, chance in enumerate(believed.tolist()):
        gold = torch.tensor([label])

        given = replace(batch, gold=gold)
        exact += chance * squared_norms(
            blocks, components, lambda given=given: classification_loss(score(model, given), given)
        )
    num_directions = [sampled_loss(model, batch, "classification", Key(step)) for step in range(100)]
    found = torch.stack([draw.count * squared_norms(blocks, components, draw.closure) for draw in num_directions])
    error = found.std(0) / len(num_directions) ** 0.5
    assert torch.all((found.mean(0) - exact).abs() < 4 * error + 1e-9)
