"""The tokenizer of the embedded model: one token per word of the world, and no text that it cannot take."""

from __future__ import annotations

import importlib
import random
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import l2l.models
from l2l.world import HELD_OUT, POOL, VALIDATION
from l2l.world.batches import encode, stream
from l2l.world.corpus import documents

TINY = Path(next(iter(l2l.models.__path__))) / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, local_files_only=True)


def _bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", POOL + VALIDATION + HELD_OUT)
def test_prompt_and_option_joined_are_their_tokens_joined_and_no_word_is_spelt(name, tokenizer):
    task = importlib.import_module(f"l2l.tasks.{name}").TASK
    for row in task.source.generate("validation", 100, 0):
        example = task.example(row)
        prompt = tokenizer(example.prompt)["input_ids"]
        assert prompt[0] == tokenizer.bos_token_id and len(prompt) <= 40
        for option in example.options:
            joined = tokenizer(example.prompt + option)["input_ids"]
            assert joined == prompt + _bare(tokenizer, option)
            words = tokenizer.convert_ids_to_tokens(joined)
            assert tokenizer.unk_token not in words and not any(word.startswith("##") for word in words)


def test_documents_survive_encoding_and_decoding(tokenizer):
    for document in islice(documents(7), 200):
        assert tokenizer.decode(_bare(tokenizer, document)) == document


def test_the_corpus_encoder_agrees_with_the_tokenizer(tokenizer):
    class NeverSpell(random.Random):
        def random(self):
            return 1.0

    for document in islice(documents(8), 200):
        expected = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        assert encode(NeverSpell(), document, tokenizer.get_vocab()) == expected


@pytest.mark.parametrize("text", ["", "Zorbing (2nd) isn't naïve: see http://a.b/c?d=3!", "雪", "great " * 300])
def test_any_text_is_taken_without_token_types(text, tokenizer):
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}


def test_a_word_outside_the_world_is_spelt_not_lost(tokenizer):
    assert tokenizer.unk_token_id not in _bare(tokenizer, "Quixotic zebras")
    assert tokenizer.decode(_bare(tokenizer, "Quixotic zebras")) == "quixotic zebras"


def test_batches_do_not_depend_on_the_number_of_workers(tokenizer):
    alone, shared = (list(islice(stream(3, tokenizer.get_vocab(), 4096, workers), 5)) for workers in (0, 1))
    assert alone == shared
