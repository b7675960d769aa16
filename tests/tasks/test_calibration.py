"""Options scored against their own wording without context."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from l2l.models.shapes import tiny_random
from l2l.tasks import get_task, task_names
from l2l.tasks.base import Example, Task, WorldData
from l2l.tasks.calibrate import calibrated_choice, without_context
from l2l.tasks.catalogue import sample_row
from l2l.tasks.evaluate import evaluate

OPTIONS = (" terrible", " great film", " good")
WORDS = ["the film was dull", "a great story", "good . good", "a dull film and a dull story", "was it great ?"]


def task_of(gold: int) -> Task:
    def example(row):
        return Example(f"{row['text']} . It was", OPTIONS, (gold,))

    return Task("mine", WorldData(lambda *_: []), ("text",), example, contextless=lambda _: "It was")


@pytest.fixture(scope="module")
def tokenizer(build_tokenizer):
    return build_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_random("gpt2", vocab_size=len(tokenizer), initializer_range=0.3)


@torch.no_grad()
def log_probability(model, tokenizer, prompt: str, option: str) -> float:
    """Sum over the option's tokens, by one plain forward pass."""
    ids = tokenizer(prompt + option)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[place - 1, ids[place]].item() for place in range(start, len(ids)))


def test_the_choice_is_the_option_whose_log_probability_the_context_raises_most(model, tokenizer):
    rows = [{"text": text} for text in WORDS]
    bare = [log_probability(model, tokenizer, "It was", option) for option in OPTIONS]
    expected, plain = [], []
    for text in WORDS:
        sums = [log_probability(model, tokenizer, f"{text} . It was", option) for option in OPTIONS]
        gains = [whole - alone for whole, alone in zip(sums, bare, strict=True)]
        expected.append(gains.index(max(gains)))
        plain.append(sums.index(max(sums)))
    assert expected != plain
    for gold in range(len(OPTIONS)):
        found = evaluate(model, tokenizer, task_of(gold), rows, batch_size=2, calibrate=True)
        assert found.value == sum(choice == gold for choice in expected) / len(WORDS)
        assert found.loss == evaluate(model, tokenizer, task_of(gold), rows, batch_size=2).loss


def test_a_context_less_prompt_that_rows_share_is_scored_once(model, tokenizer, monkeypatch):
    fed: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: fed.append(len(kw["input_ids"])) or forward(*args, **kw))
    rows = [{"text": text} for text in WORDS]
    evaluate(model, tokenizer, task_of(0), rows)
    usual = sum(fed)
    fed.clear()
    evaluate(model, tokenizer, task_of(0), rows, calibrate=True)
    assert usual < sum(fed) <= usual + len(OPTIONS)


def test_a_task_that_cannot_be_calibrated_says_what_to_do(model, tokenizer):
    with pytest.raises(ValueError, match=r"'winogrande@1' has no context-less prompt.*contextless=lambda row"):
        evaluate(model, tokenizer, get_task("winogrande"), [{}], calibrate=True)
    with pytest.raises(ValueError, match=r"'squad@1' generates its answers; only scored options can be calibrated"):
        evaluate(model, tokenizer, get_task("squad"), [{}], calibrate=True)
    with pytest.raises(ValueError, match=r"'sst2@1:empty' has no context-less prompt"):
        evaluate(model, tokenizer, get_task("sst2:empty"), [{}], calibrate=True)


def test_the_context_less_prompt_of_every_task_keeps_options_and_gold_and_drops_the_passage():
    checked = [task for task in map(get_task, task_names()) if task.contextless is not None]
    assert len(checked) >= 15
    for task in checked:
        row = sample_row(task)
        usual, bare = task.example(row), without_context(task).example(row)
        assert dataclasses.replace(bare, prompt=usual.prompt) == usual
        assert len(bare.prompt) < len(usual.prompt)
        assert bare.prompt.strip() in usual.prompt


def test_equal_gains_give_the_first_option_and_a_nan_is_not_masked():
    assert calibrated_choice([-1.0, -2.0, -1.0], [-2.0, -3.0, -1.0]) == 0
    assert calibrated_choice([-1.0, float("nan")], [-2.0, -3.0]) == 1
