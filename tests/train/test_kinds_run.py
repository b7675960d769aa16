"""Fine-tuning runs of masked models, classifiers and encoder-decoders, from a directory to a directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import l2l
from l2l.models.shapes import tiny_random
from l2l.tasks import get_task
from l2l.tasks.rows import load_rows

TASK = "world_sentiment"
SMALL = {"steps": 3, "batch_size": 4, "train_size": 12, "dev_size": 6, "test_size": 6, "eval_every": 3, "lr": 1e-3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Tiny random models of two families, and a tokenizer that knows the task's words."""
    task, folder = get_task(TASK), tmp_path_factory.mktemp("models")
    examples = [task.example(row) for row in load_rows(task, "train", None, 40)]
    texts = [text for example in examples for text in (example.prompt, *example.options)]
    words = sorted({word for text in texts for word, _ in Whitespace().pre_tokenize_str(text)})
    names = ["<pad>", "</s>", "<mask>", "<unk>", *words]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}
    for family in ("roberta", "t5"):
        model = tiny_random(family, vocab_size=len(names), pad_token_id=0, initializer_range=0.3)
        model.save_pretrained(folder / family)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize(
    ("family", "head", "name"),
    [
        ("roberta", "auto", "RobertaForMaskedLM"),
        ("roberta", "classifier", "RobertaForSequenceClassification"),
        ("t5", "auto", "T5ForConditionalGeneration"),
    ],
)
def test_a_run_trains_evaluates_and_saves_a_model_of_its_kind(saved, tmp_path, family, head, name):
    result = l2l.fine_tune(
        str(saved / family), TASK, head=head, out=str(tmp_path / "out"), progress=False, method="mezo", **SMALL
    )
    options = len(get_task(TASK).example(load_rows(get_task(TASK), "train", None, 1)[0]).options)
    assert type(result.model).__name__ == name
    assert 0 < result.summary["initial_loss"] < 20
    assert result.summary["last"]["train"]["loss"] != result.summary["initial_loss"]
    again = l2l.load_model(result.out / "model")
    assert type(again).__name__ == name
    if head == "classifier":
        assert again.config.num_labels == options


def test_what_a_kind_cannot_do_is_said_before_anything_is_written(saved, tmp_path):
    with pytest.raises(ValueError, match="needs a causal language model, but the model is a RobertaForMaskedLM"):
        l2l.fine_tune(str(saved / "roberta"), TASK, scheme="prefix", out=str(tmp_path / "out"), progress=False)
    with pytest.raises(ValueError, match="head='encoder' must be one of auto, causal"):
        l2l.fine_tune(str(saved / "roberta"), TASK, head="encoder", out=str(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()
