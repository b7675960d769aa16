"""Kind A7 of issue 16: a tokenizer and a model that do not fit are named before anything runs, with a way out that works.

Situations of others, tried here: huggingface/trl#422 and babylm/evaluation-pipeline-2023#17 (a classifier without a padding
token), huggingface/peft#1457 (tokens added to the tokenizer, and not to the model). No task of the package applies a chat
template, so none can be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import l2l
from l2l.models.load import context_length, load_model, load_tokenizer
from l2l.models.shapes import tiny_random
from l2l.tasks import get_task, load_splits
from l2l.tasks.encode import encoder_for
from l2l.tasks.evaluate import evaluate, generate

torch.set_num_threads(1)
SMALL: dict[str, Any] = {
    "task": "world_topic",
    "batch_size": 4,
    "train_size": 8,
    "dev_size": 4,
    "test_size": 4,
    "steps": 1,
    "progress": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*")


def fine_tune(out: Path, model: Any, **options: Any) -> l2l.FineTuneResult:
    return l2l.fine_tune(model, out=str(out), **{**SMALL, **options})


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer("l2l/tiny")


def rows(count: int = 4) -> list[Any]:
    return load_splits(get_task("world_topic"), None, count, count, count, 0).train


def with_a_token_of_all_rows(tokenizer: Any) -> Any:
    """The tokenizer with a token added that all prompts of the task use."""
    assert all("belong to" in get_task("world_topic").example(row).prompt for row in rows(40))
    assert tokenizer.add_tokens(["belong to"]) == 1
    return tokenizer


def test_tokens_without_a_row_of_the_embedding_are_named_and_both_ways_out_work(tokenizer, tmp_path):
    model: Any = load_model("l2l/tiny")
    larger, size = with_a_token_of_all_rows(load_tokenizer("l2l/tiny")), len(tokenizer)
    match = rf"task 'world_topic', row \d+: token '.*' has id {size}, and the model embeds ids below {size}: .*"
    with pytest.raises(ValueError, match=match + rf"model.resize_token_embeddings\({size + 1}\)"):
        fine_tune(tmp_path / "run", model, tokenizer=larger)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=match):
        evaluate(model, larger, get_task("world_topic"), rows())
    fine_tune(tmp_path / "own", model, tokenizer=tokenizer)
    model.resize_token_embeddings(size + 1)
    result = fine_tune(tmp_path / "run", model, tokenizer=larger, scheme="lora")
    again, its_tokenizer = load_model(tmp_path / "run" / "model"), load_tokenizer(tmp_path / "run" / "model")
    assert len(its_tokenizer) == size + 1
    scored = [evaluate(one, its_tokenizer, get_task("world_topic"), rows()).loss for one in (again, result.model)]
    assert scored[0] == scored[1]


def test_added_tokens_that_no_row_has_do_no_harm_and_padding_is_one_that_is_embedded(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"pad_token": "<new padding>"})
    model = load_model("l2l/tiny")
    assert encoder_for(model).pad_id(tokenizer) == 0 != tokenizer.pad_token_id
    plain = evaluate(model, load_tokenizer("l2l/tiny"), get_task("world_topic"), rows())
    assert evaluate(model, tokenizer, get_task("world_topic"), rows()).loss == plain.loss
    assert generate(model, tokenizer, ["The", "The cat is"], 64, 4) == generate(
        model, load_tokenizer("l2l/tiny"), ["The", "The cat is"], 64, 4
    )
    fine_tune(tmp_path / "run", model, tokenizer=tokenizer)


def test_an_answer_ends_where_no_token_ends_it(tokenizer):
    tokenizer.eos_token = None
    assert all(isinstance(text, str) for text in generate(load_model("l2l/tiny"), tokenizer, ["The", "A dog"], 64, 4))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_classifier_without_padding_takes_that_of_the_tokenizer(family, batch_size, tokenizer, tmp_path):
    folder = tmp_path / "base"
    tiny_random(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model: Any = load_model(folder, head="classifier", num_labels=len(get_task("world_topic").example(rows()[0]).options))
    model.config.pad_token_id = None
    result = fine_tune(tmp_path / "run", model, batch_size=batch_size)
    assert result.model.config.pad_token_id == tokenizer.pad_token_id
    encoder = encoder_for(model)
    encoded = encoder.encode(get_task("world_topic"), rows(), tokenizer, context_length(model))
    together = evaluate(result.model, tokenizer, get_task("world_topic"), rows())
    alone = [evaluate(result.model, tokenizer, get_task("world_topic"), [row]).loss for row in rows()]
    assert len({len(one.options[0].ids) for one in encoded}) > 1
    assert together.loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert load_model(tmp_path / "run" / "model").config.pad_token_id == tokenizer.pad_token_id


def test_a_classifier_without_any_padding_is_refused_and_the_way_out_works(tokenizer, tmp_path):
    folder = tmp_path / "base"
    tiny_random("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    model: Any = load_model(folder, head="classifier", num_labels=len(get_task("world_topic").example(rows()[0]).options))
    model.config.pad_token_id, tokenizer.pad_token = None, None
    match = r"neither the model nor the tokenizer has one: set tokenizer.pad_token to one of its tokens"
    with pytest.raises(ValueError, match=match):
        fine_tune(tmp_path / "run", model, tokenizer=tokenizer, batch_size=1)
    assert not (tmp_path / "run").exists()
    added = load_tokenizer("l2l/tiny")
    added.add_special_tokens({"pad_token": "<new padding>"})
    with pytest.raises(ValueError, match=rf"the tokenizer's, {len(tokenizer)}, is not embedded"):
        fine_tune(tmp_path / "run", model, tokenizer=added)
    tokenizer.pad_token = tokenizer.eos_token
    fine_tune(tmp_path / "run", model, tokenizer=tokenizer)
