"""Evaluation by options, calibrated or not, and by generated answers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from l2l.models.shapes import tiny_random
from l2l.tasks import get_task, task_names
from l2l.tasks.base import Example, GeneratedData, Task, sample_row
from l2l.tasks.encode import collate, encode, padding_id
from l2l.tasks.evaluate import calibrated_choice, evaluate, generate, without_context
from l2l.tasks.losses import batch_loss
from l2l.tasks.rows import load_rows

DYNAMIC: dict[str, Any] = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "max_position_embeddings": 16,
}
"""Rotary embeddings that are computed anew when a row is the longest so far, and kept."""

ROWS = [{"sentence": "the film was good . " * (1 + number % 5), "label": number % 2} for number in range(11)]


@pytest.fixture(scope="module")
def tokenizer(build_tokenizer):
    return build_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_random("gpt2", vocab_size=len(tokenizer), initializer_range=0.3)


@pytest.mark.parametrize("name", ["sst2", "copa"])
def test_the_loss_does_not_depend_on_the_batch_size(model, tokenizer, name):
    copa = {"premise": "the film was dull.", "choice1": "Good.", "choice2": "The story was great.", "question": "cause"}
    rows = ROWS if name == "sst2" else [copa | {"label": number % 2} for number in range(5)]
    one, many = (evaluate(model, tokenizer, get_task(name), rows, batch_size=size) for size in (1, 4))
    assert one.loss == pytest.approx(many.loss, abs=1e-5)
    assert (one.metric, one.value, one.n) == ("accuracy", many.value, len(rows))


def test_the_loss_is_the_training_loss_of_the_whole_set(model, tokenizer):
    batch = collate(encode(get_task("sst2"), ROWS, tokenizer, 100), "classification", padding_id(tokenizer))
    with torch.no_grad():
        expected = batch_loss(model, batch, "classification").item()
    assert evaluate(model, tokenizer, get_task("sst2"), ROWS, batch_size=3).loss == pytest.approx(expected, abs=1e-5)


def test_any_correct_option_is_a_hit(model, tokenizer):
    def task(gold: tuple[int, ...]) -> Task:
        example = Example("the film was", (" great", " good", " dull"), gold)
        return Task("many", GeneratedData(lambda *_: []), (), lambda _: example)

    assert evaluate(model, tokenizer, task((0, 1, 2)), [{}]).value == 1.0
    assert sum(evaluate(model, tokenizer, task((gold,)), [{}]).value for gold in range(3)) == 1.0
    assert sum(evaluate(model, tokenizer, task((gold, (gold + 1) % 3)), [{}]).value for gold in range(3)) == 2.0


def test_the_models_mode_is_put_back_even_after_an_error(model, tokenizer):
    model.train()
    evaluate(model, tokenizer, get_task("sst2"), ROWS[:2])
    assert model.training
    with pytest.raises(ValueError, match="task 'sst2', row 1: field 'sentence' is missing"):
        evaluate(model, tokenizer, get_task("sst2"), [ROWS[0], {"label": 1}])
    assert model.training
    model.eval()
    evaluate(model, tokenizer, get_task("sst2"), ROWS[:2])
    assert not model.training


def test_dropout_is_off_while_evaluating(model, tokenizer):
    model.train()
    first, second = (evaluate(model, tokenizer, get_task("sst2"), ROWS).loss for _ in range(2))
    model.eval()
    assert first == second == evaluate(model, tokenizer, get_task("sst2"), ROWS).loss


def test_no_rows_and_too_long_rows_are_errors(model, tokenizer):
    with pytest.raises(ValueError, match="task 'sst2': no rows to evaluate on"):
        evaluate(model, tokenizer, get_task("sst2"), [])
    with pytest.raises(ValueError, match=r"max_length 9999 must lie in 2\.\.256, the positions of the model"):
        evaluate(model, tokenizer, get_task("sst2"), ROWS, max_length=9999)


def test_a_trained_model_scores_real_sentences(stories, shared):
    model, tokenizer = stories
    task = get_task("sst2")
    scores = evaluate(model, tokenizer, task, load_rows(task, "validation", shared / "data", 40))
    assert scores.n == 40
    assert 0.3 < scores.loss < 1.5
    assert 0.2 < scores.value < 0.8


def test_a_generation_task_is_scored_by_f1(stories, shared):
    model, tokenizer = stories
    task = get_task("squad")
    scores = evaluate(model, tokenizer, task, load_rows(task, "validation", shared / "data", 4))
    assert (scores.metric, scores.n) == ("f1", 4)
    assert 0 <= scores.value <= 1
    assert 1 < scores.loss < 20


def test_generation_is_greedy_and_does_not_depend_on_the_batch(stories):
    model, tokenizer = stories
    prompts = ["Once upon a time", "Lily and Tom went to the park. They", "The dog"]
    together = generate(model, tokenizer, prompts, 200, max_new_tokens=12)
    alone = [generate(model, tokenizer, [prompt], 200, max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    for _ in range(12):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert (
        tokenizer.decode(ids[0], skip_special_tokens=True) == f"{prompts[0]}{'' if together[0][0] == ',' else ' '}{together[0]}"
    )


FAMILIES = ["llama", "qwen2", "gpt2", "opt", "gemma2", "gpt_neox", "qwen3", "gemma3_text", "mistral", "phi", "mixtral"]


class Probe(nn.Module):
    """Wraps a head and records for how many positions of a row it was asked."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.columns = head, []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.columns.append(hidden.shape[1])
        return self.head(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_evaluation_ask_the_head_for_no_position_they_do_not_read(tokenizer, family):
    model = tiny_random(family, vocab_size=len(tokenizer))
    probe = Probe(model.get_output_embeddings())
    model.set_output_embeddings(probe)
    generate(model, tokenizer, ["the film was good", "the story"], 60, max_new_tokens=4)
    assert set(probe.columns) == {1}
    probe.columns.clear()
    evaluate(model, tokenizer, get_task("sst2"), ROWS[:4], batch_size=4)
    great, terrible = (len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (" great", " terrible"))
    assert probe.columns == [4 * (great + terrible - 1)]  # both begin at the same place


@pytest.mark.parametrize("rope", [{}, DYNAMIC], ids=["fixed", "dynamic"])
def test_a_model_that_was_evaluated_can_be_trained(tokenizer, rope):
    """A rotary cache made in inference mode stays in the model, and a backward pass through it works."""
    model = tiny_random("llama", **rope, vocab_size=len(tokenizer))
    batch = collate(encode(get_task("sst2"), ROWS, tokenizer, 100), "classification", padding_id(tokenizer))
    generate(model, tokenizer, ["the film was good . " * 9], 100, max_new_tokens=4)
    evaluate(model, tokenizer, get_task("sst2"), ROWS, max_length=16)
    with torch.no_grad():
        assert not batch_loss(model, batch, "classification").is_inference()
    left_behind = [buffer for buffer in model.buffers() if buffer.is_inference()]
    assert bool(left_behind) == bool(rope)
    gradients = torch.autograd.grad(batch_loss(model, batch, "classification"), list(model.parameters()))
    assert sum(gradient.norm() for gradient in gradients) > 0
    copy.deepcopy(model).to(torch.float64)


class Chatter:
    """Says the same tokens whatever it is asked; records what it was given."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.device = ids, torch.device("cpu")
        self.seen: list[tuple[Any, Any, Any]] = []

    def generate(self, input_ids, attention_mask, generation_config):
        self.seen.append((input_ids, attention_mask, generation_config))
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], 1)


def test_an_answer_ends_at_the_first_newline(tokenizer):
    chatter: Any = Chatter(tokenizer(" great film\nNo", add_special_tokens=False)["input_ids"])
    assert generate(chatter, tokenizer, ["a", "the film was dull"], 60, max_new_tokens=9) == ["great film"] * 2
    input_ids, mask, config = chatter.seen[0]
    assert input_ids[mask == 1].tolist().count(tokenizer.bos_token_id) == 2
    assert mask[0].tolist() == sorted(mask[0].tolist())
    assert (config.max_new_tokens, config.do_sample, config.num_beams) == (9, False, 1)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    assert {newline, tokenizer.eos_token_id} <= set(config.eos_token_id)
    assert tokenizer(" great", add_special_tokens=False)["input_ids"][0] not in config.eos_token_id


def test_a_long_prompt_keeps_bos_and_its_end(tokenizer):
    chatter: Any = Chatter([5])
    generate(chatter, tokenizer, ["the film was good . " * 20 + "Answer:"], 20, max_new_tokens=10)
    ids = chatter.seen[0][0][0].tolist()
    assert len(ids) == 10
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids).endswith("Answer:")
    with pytest.raises(ValueError, match="max_length 10 leaves no room"):
        generate(chatter, tokenizer, ["a"], 10, max_new_tokens=10)


OPTIONS = (" terrible", " great film", " good")
WORDS = ["the film was dull", "a great story", "good . good", "a dull film and a dull story", "was it great ?"]


def calibrated_task(gold: int) -> Task:
    def example(row):
        return Example(f"{row['text']} . It was", OPTIONS, (gold,))

    return Task("mine", GeneratedData(lambda *_: []), ("text",), example, contextless=lambda _: "It was")


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
        found = evaluate(model, tokenizer, calibrated_task(gold), rows, batch_size=2, calibrate=True)
        assert found.value == sum(choice == gold for choice in expected) / len(WORDS)
        assert found.loss == evaluate(model, tokenizer, calibrated_task(gold), rows, batch_size=2).loss


def test_a_context_less_prompt_that_rows_share_is_scored_once(model, tokenizer, monkeypatch):
    fed: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: fed.append(len(kw["input_ids"])) or forward(*args, **kw))
    rows = [{"text": text} for text in WORDS]
    evaluate(model, tokenizer, calibrated_task(0), rows)
    usual = sum(fed)
    fed.clear()
    evaluate(model, tokenizer, calibrated_task(0), rows, calibrate=True)
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
