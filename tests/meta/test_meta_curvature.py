"""Traces of curvature: labels drawn from the model, probes of the Hessian, and their means over a pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bowl import Bowl, basis, exact_traces, point_on, tuner_of
from torch import Tensor
from transformers import PreTrainedModel

from l2l.meta.bases import pool_basis
from l2l.meta.curvature import FLOOR, Trace, floored, hessian_traces, pool_traces, sampled_loss
from l2l.meta.objectives.closed_forms import ExpectedCurvature, LogProgressRate
from l2l.meta.statistics import Components, squared_norms
from l2l.models.heads import token_logprobs
from l2l.models.shapes import tiny_random
from l2l.noise import Key
from l2l.params import Blocks
from l2l.tasks.encode import Batch, Encoded, EncodedOption, Form, collate
from l2l.tasks.losses import classification_loss, option_scores
from l2l.tuners.model import random_basis

OPTIONS = ((7, 3), (9,), (11, 4, 2))


def batch_of(form: Form, count: int = 1) -> Batch:
    prompts = [(1 + i, 20, 31, 40 + i) for i in range(count)]
    examples = [Encoded(tuple(EncodedOption(prompt + option, len(option)) for option in OPTIONS), (0,)) for prompt in prompts]
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
        losses = torch.tensor([sampled_loss(model, batch, "classification", Key(step)).closure() for step in range(200)])
    believed = torch.softmax(scores, 0)
    for chance, value in zip(believed, -torch.log(believed), strict=True):
        share = torch.isclose(losses, value, rtol=1e-4).float().mean().item()
        assert share == pytest.approx(chance.item(), abs=4 * (0.25 / 200) ** 0.5)


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
        exact += chance * squared_norms(blocks, components, lambda given=given: classification_loss(score(model, given), given))
    num_directions = [sampled_loss(model, batch, "classification", Key(step)) for step in range(100)]
    found = torch.stack([draw.count * squared_norms(blocks, components, draw.closure) for draw in num_directions])
    error = found.std(0) / len(num_directions) ** 0.5
    assert torch.all((found.mean(0) - exact).abs() < 4 * error + 1e-9)


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
@pytest.mark.parametrize("trace", ["hutchinson", "seen"])
def test_probed_traces_are_those_of_the_hessian_on_average(trace: Trace, inside: Tensor | None):
    model = Bowl()
    point = point_on(model, tuner_of(model, inside))
    found = []
    for step in range(60):
        at = replace(point, key=Key(1, step))
        direction = at.method.direction(at.theta.blocks, at.history, at.key)
        components = Components(at.theta.blocks, direction.basis and direction.basis.vectors)
        found.append(hessian_traces(at, components, direction, trace, 1)[0])
    samples = torch.stack(found)
    error = samples.std(0) / len(samples) ** 0.5
    assert torch.all((samples.mean(0) - exact_traces(model, inside)).abs() < 4 * error)
    assert torch.all(error < 0.3 * exact_traces(model, inside))


def test_more_probes_are_averaged_and_cost_more():
    model = Bowl()
    point = point_on(model, tuner_of(model))
    assert ExpectedCurvature(trace="hutchinson", probes=3)(point).passes == 2 + 6 + 3 * 6
    one, three = (ExpectedCurvature(trace="seen", probes=n)(point).passes for n in (1, 3))
    assert (one, three) == (14, 26)


def test_labels_that_cannot_be_drawn_are_refused_with_a_way_out():
    model = Bowl()
    with pytest.raises(ValueError, match=r"trace='fisher' draws labels.*use 'hutchinson'"):
        LogProgressRate()(point_on(model, tuner_of(model), sampled=None))
    LogProgressRate(trace="hutchinson")(point_on(model, tuner_of(model), sampled=None))


def test_traces_inside_a_basis_of_all_directions_are_those_of_the_blocks(tiny):
    model, pool = tiny
    blocks = Blocks.of(model)
    whole = random_basis(blocks, {b.name: b.tensor.shape[1] for b in blocks if b.tensor.ndim == 2 and not b.embedding})
    dense, inside = pool_traces(model, pool, 0, 1, whole)
    assert list(inside) == list(whole)
    assert inside == pytest.approx({name: dense[name] for name in whole}, rel=1e-4)
    assert pool_traces(model, pool, 0, 1) == (pytest.approx(dense), {})


def test_traces_inside_gradients_are_larger_than_in_random_directions(tiny):
    model, pool = tiny
    bases = [pool_basis(model, pool, source, 4, batches=2, points=(0, 1)) for source in ("gradients", "random")]
    learned, control = (pool_traces(model, pool, 0, 2, basis)[1] for basis in bases)
    assert sum(learned.values()) > 1.5 * sum(control.values())


def test_a_block_that_the_loss_does_not_reach_has_a_trace_all_the_same():
    found = floored(torch.tensor([0.0, 2.0, 4.0, 0.0]).double(), 3)
    assert found.tolist() == [2 * FLOOR, 2.0, 4.0, 2 * FLOOR]
    assert floored(torch.tensor([float("nan"), 1.0]), 2).isnan().any()
