"""Token ids, truncation, and merging rows."""

from __future__ import annotations

import pytest
import torch

from l2l.tasks.base import Example, Task, WorldData
from l2l.tasks.encode import Encoded, EncodedOption, collate, encode, special_prefix


def task_of(prompt: str, *options: str, gold: tuple[int, ...] = (0,)) -> Task:
    source = WorldData(lambda *_: [])
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
    assert special_prefix(tokenizer) == ((tokenizer.bos_token_id,) if bos else ())


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
    assert batch.rows.tolist() == [0, 0, 0, 0]
    assert batch.positions.tolist() == [2, 2, 1, 1]
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
    assert batch.positions.tolist() == [1, 2, 3, 1, 0, 1, 0, 1]
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
