"""Masked language models, encoder-decoders and classifiers: what is read equals a plain computation with transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from l2l.models.batching import Grouping
from l2l.models.heads import token_logprobs
from l2l.models.kinds import Head
from l2l.models.shapes import tiny_random
from l2l.tasks.base import Example, GeneratedData, Task
from l2l.tasks.encode import (
    Encoded,
    collate,
    decoder_start,
    encode_labels,
    encode_masked,
    encode_seq2seq,
    encoder_for,
)
from l2l.tasks.evaluate import evaluate, generate
from l2l.tasks.losses import batch_loss, option_scores

WORDS = ["the", "film", "was", "good", "great", "dull", "bad", "story", "it", "a", "very", "not", "terrible", "so"]
PAD, START, END, MASK, UNKNOWN = range(5)
OPTIONS = ("great", "very dull", "not bad", "terrible")
TEXTS = [(" ".join(WORDS[: 3 + 2 * number]), (number % len(OPTIONS),)) for number in range(5)]
ROWS = [{"text": text, "label": gold[0]} for text, gold in TEXTS]


def build(mask: bool = True, start: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that frames a text as RoBERTa's does, or as T5's."""
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=("<s> " if start else "") + "$A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    names = {"mask_token": "<mask>"} if mask else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **names)


def task_of(*options: str, answers: tuple[str, ...] = (), form: str = "classification") -> Task:
    def example(row) -> Example:
        return Example(row["text"], tuple(f" {option}" for option in options), (row["label"],), answers)

    return Task("mine", GeneratedData(lambda *_: []), ("text", "label"), example, form)  # pyright: ignore


TOKENIZER = build()
TASK = task_of(*OPTIONS)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def model_of(family: str, head: Head = "auto", **others):
    special = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    return tiny_random(family, head=head, initializer_range=0.3, **special, **others)


@torch.no_grad()
def scores_of(model, task=TASK, rows=ROWS, max_length=100):
    encoder = encoder_for(model)
    encoded = encoder.encode(task, rows, TOKENIZER, max_length)
    batch = collate(encoded, "classification", encoder.pad_id(TOKENIZER))
    return option_scores(token_logprobs(model, batch), batch).view(len(rows), -1), batch


@pytest.mark.parametrize("family", ["roberta", "bert"])
@torch.no_grad()
def test_a_masked_model_is_read_at_as_many_masks_as_the_option_has_tokens(family):
    model = model_of(family)
    found, batch = scores_of(model)
    for row, (text, _) in enumerate(TEXTS):
        for slot, option in enumerate(OPTIONS):
            wanted = ids_of(option)
            ids = [START, *ids_of(text), *[MASK] * len(wanted), END]
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            at = range(1 + len(ids_of(text)), 1 + len(ids_of(text)) + len(wanted))
            expected = sum(logits[place, index] for place, index in zip(at, wanted, strict=True)) / len(wanted)
            torch.testing.assert_close(found[row, slot], expected, atol=1e-5, rtol=0)
    assert len(batch.input_ids) == 2 * len(TEXTS)  # options of one token, and of two


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_is_fed_the_prompt_and_reads_the_option(family):
    model = model_of(family, decoder_start_token_id=PAD)
    found, batch = scores_of(model)
    for row, (text, _) in enumerate(TEXTS):
        for slot, option in enumerate(OPTIONS):
            source = torch.tensor([[START, *ids_of(text), END]])
            wanted = ids_of(option)
            # The decoder's rows are framed as the tokenizer frames every text.
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([[PAD, START, *wanted]])).logits[0]
            logprobs = logits.float().log_softmax(-1)
            expected = sum(logprobs[1 + place, index] for place, index in enumerate(wanted)) / len(wanted)
            torch.testing.assert_close(found[row, slot], expected, atol=1e-5, rtol=0)
    assert len(batch.input_ids) == 3 * len(TEXTS)  # the two options of one token share a row


@torch.no_grad()
def test_the_loss_of_an_answer_is_the_models_own_with_end_of_text():
    tokenizer, model = build(start=False), model_of("t5", decoder_start_token_id=PAD)
    task, rows = task_of("very great", answers=("very great",), form="lm"), [ROWS[2] | {"label": 0}]
    batch = collate(encoder_for(model).encode(task, rows, tokenizer, 100), "lm", PAD)
    ids = torch.tensor([[*ids_of(rows[0]["text"]), END]])
    own = model(input_ids=ids, labels=torch.tensor([[*ids_of("very great"), END]])).loss
    torch.testing.assert_close(batch_loss(model, batch, "lm"), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["roberta", "bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("form", ["classification", "lm"])
@torch.no_grad()
def test_a_classifiers_logits_are_the_scores_and_its_loss_is_cross_entropy(family, form):
    model = model_of(family, "classifier", num_labels=len(OPTIONS))
    model.config.pad_token_id = PAD
    rows = [torch.tensor([[START, *ids_of(text), END]]) for text, _ in TEXTS]
    logits = torch.cat([model(input_ids=ids).logits for ids in rows])
    found, batch = scores_of(model)
    torch.testing.assert_close(found, logits.log_softmax(-1), atol=1e-5, rtol=0)
    assert len(batch.input_ids) == len(TEXTS)
    encoded = encoder_for(model).encode(TASK, ROWS, TOKENIZER, 100)
    loss = batch_loss(model, collate(encoded, form, PAD), form)
    expected = functional.cross_entropy(logits, torch.tensor([row["label"] for row in ROWS]))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    scores = evaluate(model, TOKENIZER, replace(TASK, form=form), ROWS, batch_size=2)
    assert scores.loss == pytest.approx(expected.item(), abs=1e-5)
    right = (logits.argmax(1) == torch.tensor([row["label"] for row in ROWS])).tolist()
    assert scores.value == sum(right) / len(right)


@pytest.mark.parametrize(("family", "head"), [("roberta", "auto"), ("t5", "auto"), ("bert", "classifier")])
def test_the_loss_has_a_gradient_and_does_not_depend_on_batches_or_groups(family, head):
    model = model_of(family, head, num_labels=len(OPTIONS))
    encoded = encoder_for(model).encode(TASK, ROWS, TOKENIZER, 100)
    batch = collate(encoded, "classification", PAD)
    parted = replace(batch, parts=Grouping(3).split(batch))
    assert bool(parted.parts) == (family == "roberta")
    loss = batch_loss(model, parted, "classification")
    torch.testing.assert_close(loss, batch_loss(model, batch, "classification"), atol=1e-5, rtol=0)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    one, many = (evaluate(model, TOKENIZER, TASK, ROWS, batch_size=size) for size in (1, 5))
    assert one.loss == pytest.approx(many.loss, abs=1e-5) == pytest.approx(loss.item(), abs=1e-5)


def test_a_long_prompt_loses_its_left_and_keeps_what_stands_around_it():
    row, limit = [ROWS[4]], 8
    prompt = ids_of(ROWS[4]["text"])
    masked = encode_masked(TASK, row, TOKENIZER, limit)[0].options
    assert [option.ids for option in masked[:2]] == [
        (START, *prompt[-4:], MASK, END),
        (START, *prompt[-4:], MASK, MASK, END),
    ]
    framed = (START, *prompt[-6:], END)
    assert {option.ids for option in encode_seq2seq(TASK, row, TOKENIZER, limit, PAD)[0].options} == {framed}
    assert {option.ids for option in encode_labels(TASK, row, TOKENIZER, limit, 4)[0].options} == {framed}
    for encode in (encode_masked, partial(encode_seq2seq, start=PAD)):
        with pytest.raises(ValueError, match=r"task 'mine', row 0: an option of 2 tokens does not fit into max_length 2"):
            encode(TASK, row, TOKENIZER, 2)
    with pytest.raises(ValueError, match=r"task 'mine', row 0: a prompt of 11 tokens cannot be fed at max_length 1"):
        encode_labels(TASK, row, TOKENIZER, 1, 4)


def test_a_classifier_needs_the_same_options_in_every_row_and_a_label_for_each():
    with pytest.raises(ValueError, match="task 'mine' has 4 options, but the model's head has 2 labels"):
        encode_labels(TASK, ROWS, TOKENIZER, 100, 2)
    varied = Task("mine", GeneratedData(lambda *_: []), (), lambda row: Example("the film", (" a", f" {row['text']}")))
    with pytest.raises(ValueError, match="task 'mine', row 1: its options differ from those of row 0"):
        encode_labels(varied, ROWS, TOKENIZER, 100, 2)


def test_what_a_kind_cannot_do_is_one_clear_error():
    generation = task_of("great", answers=("great",))
    encoders = {"a masked language model": encode_masked, "a sequence classifier": partial(encode_labels, labels=1)}
    for kind, encode in encoders.items():
        with pytest.raises(ValueError, match=f"task 'mine' asks for generated answers, which {kind} cannot give"):
            encode(generation, ROWS[:1], TOKENIZER, 100)
    with pytest.raises(ValueError, match=r"asked through mask tokens, but the tokenizer .* has none"):
        encode_masked(TASK, ROWS, build(mask=False), 100)
    with pytest.raises(ValueError, match="BertForMaskedLM cannot generate text; use a causal or seq2seq"):
        generate(tiny_random("bert"), TOKENIZER, ["the film"], 60)
    empty = replace(TASK, example=lambda row: Example("the film", ("  ",)))
    with pytest.raises(ValueError, match="row 0: option 0 has no token of its own"):
        encode_seq2seq(empty, ROWS[:1], TOKENIZER, 100, PAD)


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_answers_greedily_whatever_the_batch(family):
    model = model_of(family, decoder_start_token_id=PAD, vocab_size=len(TOKENIZER))
    prompts = [text for text, _ in TEXTS[:3]]
    together = generate(model, TOKENIZER, prompts, 60, max_new_tokens=6)
    assert together == [generate(model, TOKENIZER, [prompt], 60, max_new_tokens=6)[0] for prompt in prompts]
    source, ids = torch.tensor([[START, *ids_of(prompts[1]), END]]), torch.tensor([[PAD, START]])
    for _ in range(6):
        following = model(input_ids=source, decoder_input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
        if following.item() == END:
            break
    assert together[1] == TOKENIZER.decode(ids[0, 2:], skip_special_tokens=True)
    scores = evaluate(model, TOKENIZER, replace(task_of("great", answers=("great",)), metric="f1"), [ROWS[0]])
    assert 0 <= scores.value <= 1


@torch.no_grad()
def test_what_a_checkpoint_asks_for_in_generation_does_not_change_the_greedy_answer():
    model = model_of("llama", vocab_size=len(TOKENIZER))
    plain = generate(model, TOKENIZER, ["the film was"], 60, max_new_tokens=8)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.forced_eos_token_id = 5.0, 1, END
    own.suppress_tokens = ids_of(plain[0])
    assert generate(model, TOKENIZER, ["the film was"], 60, max_new_tokens=8) == plain
    assert model.generation_config is own


def test_the_decoder_starts_as_the_model_says_or_with_padding():
    model = model_of("t5", decoder_start_token_id=7)
    assert decoder_start(model) == 7
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    assert decoder_start(model) == PAD
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="does not say which token its decoder starts with"):
        decoder_start(model)


def test_equal_rows_are_fed_once_and_no_row_answers_for_its_beginning():
    first, second = (encode_masked(TASK, [row], TOKENIZER, 100)[0] for row in ROWS[:2])
    batch = collate([first, first, second], "classification", PAD)
    assert len(batch.input_ids) == 4
    assert isinstance(first, Encoded) and hash(first) == hash(encode_masked(TASK, [ROWS[0]], TOKENIZER, 100)[0])
    nested = encode_labels(TASK, ROWS[:2], build(start=False), 100, 4)
    assert len(collate(nested, "classification", PAD).input_ids) == 2
