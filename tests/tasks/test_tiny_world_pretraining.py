"""Pretraining of the embedded model, ``benchmarks/tiny_world``: repeatable, and on the text that the model was made from."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pretrain
import pytest
from corpus import documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2l.models import shapes as tiny_random

MODEL = Path(tiny_random.__file__).parent / "tiny"
SCRIPT = Path(pretrain.__file__)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def test_documents_survive_encoding_and_decoding(tokenizer):
    for document in islice(documents(7), 200):
        assert tokenizer.decode(tokenizer(document, add_special_tokens=False)["input_ids"]) == document


def test_the_corpus_encoder_agrees_with_the_tokenizer(tokenizer):
    class NeverSpell(random.Random):
        def random(self):
            return 1.0

    for document in islice(documents(8), 200):
        expected = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        assert pretrain.encode(NeverSpell(), document, tokenizer.get_vocab()) == expected


@pytest.mark.slow  # starts a process
def test_batches_do_not_depend_on_the_number_of_workers(tokenizer):
    alone, shared = (list(islice(pretrain.stream(3, tokenizer.get_vocab(), 4096, workers), 5)) for workers in (0, 1))
    assert alone == shared


@pytest.mark.slow
def test_the_tokenizer_built_anew_is_the_shipped_one(tokenizer):
    assert pretrain.build_tokenizer().get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("batches", "within"), [(6, 0.05), pytest.param(40, 1e-3, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_validation_loss_is_the_one_recorded_when_it_was_pretrained(tokenizer, batches, within):
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    recorded = json.loads((MODEL / "pretraining.json").read_text())["validation_loss"]
    found = pretrain.validation_loss(model, tokenizer, "cpu", batches)
    assert found == pytest.approx(recorded, abs=within)


def test_pretraining_twice_with_one_seed_gives_the_same_weights(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(pretrain, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(pretrain, "validation_loss", lambda *_: 0.0)
    for name in ("a", "b"):
        options = ["--steps", "2", "--tokens", "128", "--hidden", "32", "--layers", "1"]
        pretrain.main(["--out", str(tmp_path / name), *options])
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "argv",
    [["--out", "x"], ["--out", "x", "--steps", "1", "--minutes", "1"], ["--out", "x", "--steps", "1", "--seed", "-1"]],
)
def test_contradicting_options_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(argv)
    assert "--" in capsys.readouterr().err


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(["--out", str(tmp_path), "--steps", "1"])
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_starts_it_from_anywhere(tmp_path):
    command = [sys.executable, str(SCRIPT), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage: python benchmarks/tiny_world/pretrain.py" in done.stdout
