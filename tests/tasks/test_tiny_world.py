"""The tasks of the tiny world: pure, balanced rows that never share a text between splits, in words that the embedded
model has one token for and knows something about."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from daily import daily_slice
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2l.models import shapes as tiny_random
from l2l.tasks import get_task, task_names
from l2l.tasks.base import GeneratedData
from l2l.tasks.evaluate import evaluate
from l2l.tasks.losses import batch_loss
from l2l.tasks.rows import load_rows
from l2l.tasks.tiny_world import HELD_OUT, POOL, VALIDATION
from l2l.tasks.tiny_world.tasks import generate_rows
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import prepare_fine_tuning

NAMES = POOL + VALIDATION + HELD_OUT
MODEL = Path(tiny_random.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def rows_of(name: str, split, count: int, seed: int):
    return load_rows(get_task(name), split, None, count, seed)


def test_every_task_with_generated_rows_is_in_one_of_the_three_groups():
    generated = [name for name in task_names() if isinstance(get_task(name).source, GeneratedData)]
    assert sorted(NAMES) == generated


@pytest.mark.parametrize("name", NAMES)
def test_rows_carry_the_declared_fields_and_render(name):
    task = get_task(name)
    for row in rows_of(name, "train", 40, 3):
        assert tuple(row) == task.fields
        example = task.example(row)
        assert example.gold == (row["label"],) and len(example.options) >= 2
        assert all(option.startswith(" ") for option in example.options) and not example.prompt.endswith(" ")
        assert len(set(example.options)) == len(example.options)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_rows_and_another_seed_gives_others(name):
    rows = rows_of(name, "train", 60, 1)
    assert rows == rows_of(name, "train", 60, 1)
    assert rows != rows_of(name, "train", 60, 2)
    assert rows[:30] == rows_of(name, "train", 30, 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_in_both_splits_and_labels_are_balanced(name):
    train = {row["text"] for row in rows_of(name, "train", 600, 0)}
    validation = rows_of(name, "validation", 240, 1)
    assert not train & {row["text"] for row in validation}
    counts = Counter(row["label"] for row in validation)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_an_unknown_split_is_named_in_the_error():
    with pytest.raises(ValueError, match="'test'"):
        generate_rows("any", "test", 1, 0, 2, lambda rng, label: {"text": ""})  # pyright: ignore


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_option_joined_are_their_tokens_joined_and_no_word_is_spelt(name, tokenizer):
    task = get_task(name)
    for row in rows_of(name, "validation", 50, 0):
        example = task.example(row)
        prompt = tokenizer(example.prompt)["input_ids"]
        assert prompt[0] == tokenizer.bos_token_id and len(prompt) <= 40
        for option in example.options:
            joined = tokenizer(example.prompt + option)["input_ids"]
            assert joined == prompt + tokenizer(option, add_special_tokens=False)["input_ids"]
            words = tokenizer.convert_ids_to_tokens(joined)
            assert tokenizer.unk_token not in words and not any(word.startswith("##") for word in words)


@pytest.mark.parametrize("text", ["", "Zorbing (2nd) isn't naïve: see http://a.b/c?d=3!", "雪", "great " * 300])
def test_any_text_is_taken_without_token_types(text, tokenizer):
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}


def test_a_word_outside_the_world_is_spelt_not_lost(tokenizer):
    ids = tokenizer("Quixotic zebras", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "quixotic zebras"


def test_the_shipped_files_are_small_and_the_weights_float32(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 8e6
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("name", "chance"),
    daily_slice([("world_category", 1 / 6), ("world_topic", 1 / 6), ("world_season", 1 / 4)], 1),
)
def test_the_embedded_model_is_above_chance_before_any_tuning(name, chance):
    parts = prepare_fine_tuning(FineTuneConfig(task=name, train_size=20, dev_size=10, test_size=200))
    scores = evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test)
    assert math.isfinite(scores.loss) and scores.value > chance + 0.05


def test_a_few_first_order_steps_teach_the_embedded_model_a_task():
    parts = prepare_fine_tuning(FineTuneConfig(task="world_season", train_size=400, test_size=60))
    before = evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test).loss
    adam = torch.optim.Adam(parts.model.parameters(), lr=3e-4)
    for step in range(25):
        adam.zero_grad()
        batch_loss(parts.model, parts.closures.batcher.at(step), parts.closures.batcher.form).backward()
        adam.step()
    assert evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test).loss < 0.7 * before
