"""Token ids of causal models, truncation, and the layout of rows: plain ones, trees, and which of them feeds less."""

from __future__ import annotations

import random

import pytest
import torch

from l2l.models.batching import Grouping
from l2l.models.prompt_trees import chain, common_prefix, grow, row_lengths, tree_attention_mask, tree_inputs
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tasks.encode import Encoded, EncodedOption, collate, encode, lay_out, merge_rows, pays, special_ids


def task_of(prompt: str, *options: str, gold: tuple[int, ...] = (0,)) -> Task:
    source = GeneratedData(lambda *_: [])
    return Task("mine", source, (), lambda _: Example(prompt, options, gold))


def encode_one(tokenizer, max_length: int, prompt: str, *options: str) -> Encoded:
    return encode(task_of(prompt, *options), [{}], tokenizer, max_length)[0]


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_ids_are_prompt_and_option_with_bos_and_without_eos(build_tokenizer, bos, eos):
    tokenizer = build_tokenizer(bos, eos)
    option = encode_one(tokenizer, 50, "the film . It was", " great").options[0]
    assert tokenizer.decode(option.ids[bos:]) == "the film . It was great"
    assert tokenizer.decode(option.ids[-option.length :]) == " great"
    assert (option.ids[0] == tokenizer.bos_token_id) == bos
    assert tokenizer.eos_token_id not in option.ids
    assert special_ids(tokenizer)[0] == ((tokenizer.bos_token_id,) if bos else ())


def test_a_token_across_the_boundary_belongs_to_the_option(build_tokenizer):
    tokenizer = build_tokenizer()
    assert len(tokenizer(" great")["input_ids"]) == 1
    option = encode_one(tokenizer, 50, "It was gr", "eat").options[0]
    assert tokenizer.decode(option.ids[-option.length :]) == " great"
    assert tokenizer.decode(option.ids) == "It was great"


def test_a_sentencepiece_token_across_the_boundary_belongs_to_the_option(stories):
    tokenizer = stories[1]
    for prompt, option in [("It wa", "s great"), ("One day, Li", "ly"), ("the end.\n", "Yes"), ("He said ", "yes")]:
        encoded = encode_one(tokenizer, 50, prompt, option).options[0]
        assert encoded.ids == tuple(tokenizer(prompt + option)["input_ids"])
        tail = tokenizer.decode(encoded.ids[-encoded.length :])
        assert len(tail) >= len(option.strip())
        assert (prompt + option).endswith(tail)


def test_truncation_drops_the_left_of_the_prompt_and_keeps_bos_and_option(build_tokenizer):
    tokenizer = build_tokenizer(bos=True)
    full = encode_one(tokenizer, 1000, "the film was dull . It was", " terrible", " great")
    cut = encode_one(tokenizer, 8, "the film was dull . It was", " terrible", " great")
    surplus = max(len(option.ids) for option in full.options) - 8
    assert surplus > 0
    for before, after in zip(full.options, cut.options, strict=True):
        assert after.length == before.length
        assert after.ids == (tokenizer.bos_token_id, *before.ids[1 + surplus :])
    assert max(len(option.ids) for option in cut.options) == 8


def test_an_option_that_does_not_fit_is_an_error_that_names_the_row(build_tokenizer):
    with pytest.raises(ValueError, match=r"task 'mine', row 0: an option of \d+ tokens does not fit into max_length 3"):
        encode_one(build_tokenizer(bos=True), 3, "the film", " terrible film story")


@pytest.mark.parametrize(
    ("prompt", "option", "message"),
    [("", " great", "nothing comes before the option"), ("It was", "", "each must be non-empty")],
)
def test_an_option_without_prompt_or_without_token_is_an_error(build_tokenizer, prompt, option, message):
    with pytest.raises(ValueError, match=f"task 'mine', row 0: .*{message}"):
        encode_one(build_tokenizer(), 50, prompt, option)


def test_an_option_that_the_tokenizer_swallows_is_an_error(build_tokenizer):
    from tokenizers.normalizers import Strip

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Strip()
    with pytest.raises(ValueError, match="task 'mine', row 0: option 1 has no token of its own"):
        encode_one(tokenizer, 50, "It was", " great", " ")


def test_no_rows_encode_to_nothing_and_do_not_collate(build_tokenizer):
    assert encode(task_of("a", " b"), [], build_tokenizer(), 50) == []
    with pytest.raises(ValueError, match="at least one example"):
        collate([], "lm", 0)


def example(prompt: tuple[int, ...], *options: tuple[int, ...], gold: int = 0) -> Encoded:
    return Encoded(tuple(EncodedOption(prompt + option, len(option)) for option in options), (gold,))


def test_one_token_options_of_a_prompt_cost_one_row():
    batch = collate([example((5, 6, 7), (8,), (9,), gold=1), example((5, 6), (1,), (2,))], "classification", 0)
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert batch.rows.tolist() == [0, 0]
    assert batch.positions.tolist() == [2, 1]
    assert batch.places.tolist() == [0, 0, 1, 1]
    assert batch.targets.tolist() == [8, 9, 1, 2]
    assert batch.option_example.tolist() == [0, 0, 1, 1]
    assert batch.gold.tolist() == [1, 0]
    assert batch.n == 2


def test_options_of_several_tokens_are_read_at_the_right_places():
    batch = collate([example((5, 6), (7, 8, 9), (1,)), example((4,), (3, 2), (3, 1))], "classification", 99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [4, 3, 99, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.options.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.token_slot.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert batch.rows.tolist() == [0, 0, 0, 1, 1]
    assert batch.positions.tolist() == [1, 2, 3, 0, 1]
    assert batch.places.tolist() == [0, 1, 2, 0, 3, 4, 3, 4]
    assert batch.targets.tolist() == [7, 8, 9, 1, 3, 2, 3, 1]
    assert (batch.longest, batch.width) == (3, 2)


def test_the_lm_form_holds_only_the_gold_option():
    batch = collate([example((5, 6), (7, 8), (1, 2), gold=1)], "lm", 0)
    assert batch.input_ids.tolist() == [[5, 6, 1]]
    assert batch.targets.tolist() == [1, 2]
    assert batch.gold.tolist() == [0]


def test_a_pad_id_inside_an_option_is_a_token_like_any_other():
    batch = collate([example((5, 6), (0, 7), (8, 9, 0))], "classification", 0)
    assert batch.targets.tolist() == [0, 7, 8, 9, 0]
    assert batch.attention_mask.sum().item() == 3 + 4


def test_a_batch_moves_all_its_tensors():
    batch = collate([example((5, 6), (7,), (8,))], "classification", 0, "meta")
    assert {value.device.type for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert batch.n == 1


SHARING = Grouping(tree=1000)


def some_inputs(seed: int) -> list[tuple[int, ...]]:
    """Inputs over a small alphabet, that begin alike in many ways; some equal, some the beginning of another."""
    draw = random.Random(seed)
    start = tuple(draw.choices(range(3), k=draw.randint(0, 4)))
    return [start + tuple(draw.choices(range(3), k=draw.randint(1, 6))) for _ in range(draw.randint(1, 8))]


@pytest.mark.parametrize("seed", range(6))
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
        pairs = [(value, vars(right)[name]) for name, value in vars(left).items()]
        assert all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1] for pair in pairs)


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
