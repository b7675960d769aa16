"""Where inputs stand: plain rows, trees, and which of them feeds less."""

from __future__ import annotations

import random

import pytest
import torch

from l2l.models.batching import Grouping
from l2l.models.prompt_trees import chain, common_prefix, grow, row_lengths, tree_attention_mask, tree_inputs
from l2l.tasks.encode import Encoded, EncodedOption, collate
from l2l.tasks.layout import lay_out, merge_rows, pays

SHARING = Grouping(tree=1000)


def some_inputs(seed: int) -> list[tuple[int, ...]]:
    """Inputs over a small alphabet, that begin alike in many ways; some equal, some the beginning of another."""
    draw = random.Random(seed)
    start = tuple(draw.choices(range(3), k=draw.randint(0, 4)))
    return [start + tuple(draw.choices(range(3), k=draw.randint(1, 6))) for _ in range(draw.randint(1, 8))]


@pytest.mark.parametrize("seed", range(30))
def test_a_tree_holds_every_input_once_and_its_tokens_see_their_own_input_only(seed):
    inputs = some_inputs(seed)
    tree = grow(inputs)
    assert len(tree.ids) == len({ids[: k + 1] for ids in inputs for k in range(len(ids))})
    seen = tree_attention_mask([tree])[0]
    position = tree_inputs(seen[None], torch.float32)["position_ids"][0]
    for ids in inputs:
        columns = list(tree.columns[ids])
        assert tuple(tree.ids[column] for column in columns) == ids
        for k, column in enumerate(columns):
            assert seen[column].nonzero()[:, 0].tolist() == columns[: k + 1]
            assert position[column] == k


def test_padding_is_seen_by_nobody_and_sees_itself_alone_when_it_is_fed():
    seen = tree_attention_mask([grow([(1, 2), (1, 3)]), chain((4, 5, 6, 7, 8))])
    assert row_lengths(seen).tolist() == [3, 5]
    assert not seen[0, 3:].any() and not seen[0, :, 3:].any()
    assert torch.equal(seen[1], torch.ones(5, 5).tril().bool())
    fed = tree_inputs(seen, torch.bfloat16)
    mask = fed["attention_mask"]
    assert (mask.shape, mask.dtype) == ((2, 1, 5, 5), torch.bfloat16)
    assert torch.equal(mask[0, 0, 3:] == 0, torch.eye(5)[3:].bool())
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}
    assert fed["position_ids"].tolist() == [[0, 1, 1, 0, 0], [0, 1, 2, 3, 4]]


def test_the_common_beginning_is_found_wherever_it_ends():
    for end in range(7):
        left = tuple(range(6))
        assert common_prefix(left, (*left[:end], 9, 9)) == min(end, 6)
    assert common_prefix((), (1,)) == 0


def test_six_options_of_three_tokens_feed_their_prompt_once():
    prompt = tuple(range(100))
    layout = lay_out([[(*prompt, 200 + k, 300 + k, 400 + k) for k in range(6)]], SHARING)
    assert [len(row.ids) for row in layout.rows] == [100 + 18]
    assert layout.branching
    assert layout.row_of == (0,) * 6


def test_sharing_pays_from_a_fifth_less():
    assert pays(100, 80)
    assert not pays(100, 81)
    assert not pays(0, 1)


def test_inputs_that_share_too_little_keep_rows_of_their_own():
    apart = [(1, *range(10, 30)), (1, *range(30, 50))]
    assert lay_out([apart], SHARING) == lay_out([apart])
    assert not lay_out([apart], SHARING).branching


def test_a_tree_longer_than_allowed_is_not_made_nor_a_plain_row_read_beside_one():
    inputs = [(*range(20), 30 + k) for k in range(4)]
    assert lay_out([inputs], Grouping(tree=24)).branching
    assert not lay_out([inputs], Grouping(tree=23)).branching
    assert not lay_out([inputs, [tuple(range(60, 85))]], Grouping(tree=24)).branching
    assert lay_out([inputs, [tuple(range(60, 84))]], Grouping(tree=24)).branching


def test_a_long_tree_among_short_plain_rows_is_only_made_where_lengths_are_split():
    inputs = [(*range(20), *range(40 + 9 * k, 49 + 9 * k)) for k in range(2)]
    short = [[(100 + k, 200 + k)] for k in range(10)]
    assert lay_out([inputs], SHARING).branching
    assert not lay_out([inputs, *short], SHARING).branching
    assert lay_out([inputs, *short], Grouping(groups=2, tree=1000)).branching


@pytest.mark.parametrize("groups", [1, 3])
def test_the_cost_is_that_of_the_cheapest_split(groups):
    assert Grouping(groups, extra=1).cost([4, 2, 9, 4]) == {1: 36, 3: 9 + 8 + 2 + 2}[groups]
    assert Grouping(groups, extra=1000).cost([4, 2, 9, 4]) == 36


def one_token_options(seed: int) -> list[Encoded]:
    draw = random.Random(seed)
    prompts = [tuple(draw.choices(range(50), k=draw.randint(2, 9))) for _ in range(6)]
    return [Encoded(tuple(EncodedOption((*prompt, 60 + k), 1) for k in range(4)), (1,)) for prompt in prompts]


@pytest.mark.parametrize("form", ["classification", "lm"])
def test_one_token_options_and_gold_options_alone_are_laid_out_as_ever(form):
    examples = one_token_options(1)
    if form == "lm":
        examples = [Encoded(tuple(EncodedOption((*o.ids, 7, 8), 3) for o in e.options), (1,)) for e in examples]
    plain, allowed = collate(examples, form, 0), collate(examples, form, 0, grouping=SHARING)
    for name, value in vars(plain).items():
        other = vars(allowed)[name]
        assert torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
    assert allowed.attention_mask.ndim == 2
    split = Grouping(3), Grouping(3, tree=1000)
    for left, right in zip(split[0].split(plain), split[1].split(allowed), strict=True):
        assert all(torch.equal(value, vars(right)[name]) for name, value in vars(left).items())


def test_inputs_that_begin_another_share_its_row():
    inputs = [(1, 2), (1, 2, 3), (4,), (1, 2), (4, 5), (1, 3), ()]
    rows, kept = merge_rows(inputs)
    assert sorted(kept) == [(1, 2, 3), (1, 3), (4, 5)]
    for ids, row in zip(inputs, rows, strict=True):
        assert kept[row][: len(ids)] == ids


def test_whatever_the_layout_every_token_is_read_where_it_stands():
    for seed in range(30):
        groups = [some_inputs(1000 * seed + k) for k in range(5)]
        for grouping in (None, SHARING):
            layout = lay_out(groups, grouping)
            flat = [ids for inputs in groups for ids in inputs]
            for ids, row, columns in zip(flat, layout.row_of, layout.columns, strict=True):
                assert tuple(layout.rows[row].ids[column] for column in columns) == ids
