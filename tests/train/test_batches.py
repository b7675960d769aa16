"""Batches by step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from l2l.meta.config import MetaTrainConfig
from l2l.models.batching import Grouping
from l2l.models.heads import Part
from l2l.tasks.encode import Batch, Encoded, EncodedOption
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import Batcher, batch_indices

EXAMPLES = [Encoded((EncodedOption((n + 3,) * (3 + 3 * n), 1),), (0,)) for n in range(11)]


def batcher(groups: int) -> Batcher:
    return Batcher(EXAMPLES, "classification", 0, 4, seed=5, grouping=Grouping(groups))


def assert_same(left: Batch | Part, right: Batch | Part) -> None:
    for field in dataclasses.fields(left):
        one, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_splitting_rows_by_length_changes_no_batch():
    for step in range(6):
        for whole, parted in [
            (batcher(1).at(step), batcher(3).at(step)),
            (batcher(1).further(step, 1), batcher(3).further(step, 1)),
        ]:
            assert not whole.parts
            assert len(parted.parts) > 1
            assert_same(whole, dataclasses.replace(parted, parts=()))


def test_a_batch_and_its_parts_are_a_function_of_the_step_alone():
    first, again = batcher(3), batcher(3)
    first.at(0)
    for left, right in zip(first.at(4).parts, again.at(4).parts, strict=True):
        assert_same(left, right)


def test_an_epoch_sees_every_row_once():
    seen = [index for step in range(11) for index in batch_indices(11, 4, 0, step)]
    assert sorted(seen) == sorted(list(range(11)) * 4)
    assert sorted(seen[:11]) == list(range(11))


@pytest.mark.parametrize("config", [FineTuneConfig, MetaTrainConfig])
def test_length_groups_must_be_a_positive_number_or_left_out(config):
    assert config(length_groups=None).length_groups is None
    assert config(length_groups=2).length_groups == 2
    with pytest.raises(ValueError, match="length_groups=0 must be a whole number, at least 1"):
        config(length_groups=0)


@pytest.mark.parametrize(
    ("field", "choices"), [("perturb", "auto, in_place, functional"), ("update", "auto, master, stochastic")]
)
def test_a_word_that_is_no_choice_is_named_with_the_choices(field, choices):
    assert getattr(FineTuneConfig(), field) == "auto"
    with pytest.raises(ValueError, match=f"{field}='fast' must be one of {choices}"):
        FineTuneConfig(**{field: "fast"})
