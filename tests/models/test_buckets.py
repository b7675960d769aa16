"""Rows split by length: the cheapest split, and the same numbers from it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from l2l.models.batching import Grouping, forward_cost, partition
from l2l.models.heads import token_logprobs
from l2l.models.shapes import tiny_random
from l2l.tasks.encode import Batch, Encoded, EncodedOption, Form, collate
from l2l.tasks.losses import batch_loss, option_scores

torch.set_num_threads(1)
FAMILIES = ["llama", "qwen2", "gpt2", "opt", "gemma2", "gpt_neox", "mixtral"]


def examples(seed: int = 0) -> list[Encoded]:
    """Prompts of 3 to 60 tokens; options that share a row, that do not, and more of them in some examples."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 128, (count,), generator=generator).tolist())

    shapes = [(60, (1, 1)), (3, (1, 2)), (20, (3, 2, 1)), (5, (1, 1)), (41, (1, 4)), (4, (2, 2))]
    prompts = [(ids(length), lengths) for length, lengths in shapes]
    return [Encoded(tuple(EncodedOption(p + ids(k), k) for k in lengths), (0,)) for p, lengths in prompts]


def split(batch: Batch, groups: int = 3, extra: int = 0) -> Batch:
    return replace(batch, parts=Grouping(groups, extra).split(batch))


def cost(lengths: list[int], groups: list[list[int]], extra: int) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in groups) + extra * (len(groups) - 1)


def cheapest(lengths: list[int], groups: int, extra: int) -> int:
    """Over every way to give each row a group, contiguous or not."""
    found = []
    for labels in product(range(groups), repeat=len(lengths)):
        sets = [[row for row, label in enumerate(labels) if label == group] for group in set(labels)]
        found.append(cost(lengths, sets, extra))
    return min(found)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 3, 50])
def test_no_partition_is_cheaper(groups, extra):
    generator = torch.Generator().manual_seed(groups)
    for count in range(1, 8):
        lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
        found = partition(lengths, groups, extra)
        assert sorted(row for rows in found for row in rows) == list(range(count))
        assert len(found) <= groups
        assert cost(lengths, found, extra) == cheapest(lengths, groups, extra)


def test_equally_cheap_partitions_give_the_fewest_groups_and_equal_lengths_are_never_split():
    assert partition([7] * 5, 4) == [[0, 1, 2, 3, 4]]
    assert partition([4, 2], 2, extra=2) == [[1, 0]]
    assert partition([4, 2], 2, extra=1) == [[1], [0]]
    assert partition([9, 3, 9, 3, 3], 5) == [[1, 3, 4], [0, 2]]


@pytest.mark.parametrize(("lengths", "groups"), [([], 2), ([3], 0)])
def test_nothing_to_split_or_no_group_is_an_error(lengths, groups):
    with pytest.raises(ValueError, match=f"cannot split {len(lengths)} rows into {groups} groups"):
        partition(lengths, groups)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_random(request.param, initializer_range=0.3)


@torch.no_grad()
@pytest.mark.parametrize("form", ["classification", "lm"])
def test_the_scores_and_the_loss_are_those_of_one_padded_batch(model, form: Form):
    batch = collate(examples(), form, 0)
    for groups in (2, 3, 99):
        parted = split(batch, groups)
        assert 2 <= len(parted.parts) <= groups
        logprobs = token_logprobs(model, batch, parted.parts)
        scores = option_scores(logprobs, batch), option_scores(token_logprobs(model, batch), batch)
        torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
        losses = batch_loss(model, parted, form), batch_loss(model, batch, form)
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def test_the_gradients_are_those_of_one_padded_batch(model):
    batch = collate(examples(), "classification", 0)
    parameters = list(model.parameters())
    parted, whole = (torch.autograd.grad(batch_loss(model, one, "classification"), parameters) for one in (split(batch), batch))
    for left, right in zip(parted, whole, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_fewer_tokens_are_fed_and_every_one_that_counts_is(monkeypatch):
    model, batch = tiny_random("llama"), collate(examples(), "classification", 0)
    seen: list[tuple[Any, Any]] = []
    forward = model.forward

    def watched(**inputs: Any) -> Any:
        seen.append((inputs["input_ids"], inputs["attention_mask"]))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    batch_loss(model, split(batch), "classification")
    assert len(seen) == 3
    assert sum(ids.numel() for ids, _ in seen) < 0.6 * batch.input_ids.numel()
    fed = sorted(tuple(row[kept == 1].tolist()) for ids, mask in seen for row, kept in zip(ids, mask, strict=True))
    pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
    assert fed == sorted(tuple(row[kept == 1].tolist()) for row, kept in pairs)


def test_a_batch_of_one_row_or_of_one_group_is_fed_whole():
    one = collate([Encoded((EncodedOption((5, 6, 7), 1), EncodedOption((5, 6, 8), 1)), (0,))], "classification", 0)
    assert len(one.input_ids) == 1
    assert Grouping(4).split(one) == ()
    batch = collate(examples(), "classification", 0)
    assert Grouping().split(batch) == ()
    assert Grouping(4, extra=10_000).split(batch) == ()


def test_parts_move_with_their_batch():
    batch = split(collate(examples(), "classification", 0)).to("meta")
    assert batch.parts
    values = [value for part in batch.parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert {value.device.type for value in values} == {"meta"} and len(values) == 7 * len(batch.parts)


def test_one_more_pass_costs_small_models_more_tokens_and_heads_do_not_count():
    small = tiny_random("llama")
    wide = tiny_random("llama", hidden_size=256, intermediate_size=1024)
    wordy = tiny_random("llama", vocab_size=5000)
    assert forward_cost(small) == forward_cost(wordy) > forward_cost(wide) > 20
    found = Grouping.of(small, 3, share_prompts=False)
    assert (found.groups, found.extra, found.tree) == (3, forward_cost(small), 0)
    assert Grouping.of(small).groups > 1
    assert Grouping.of(small.to("meta")).groups == 1
