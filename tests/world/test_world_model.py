"""The embedded model loads offline, is small, knows the world, and pretraining is repeatable."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2l.world.measure import MODEL, adam, encode, evaluate, load_task
from l2l.world.pretrain import main, parse, validation_loss


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture()
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True).eval()


def test_the_shipped_files_are_small_and_the_weights_float32(model, tokenizer):
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 8e6
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)


def test_the_validation_loss_is_the_one_recorded_when_it_was_pretrained(model, tokenizer):
    recorded = json.loads((MODEL / "pretraining.json").read_text())["validation_loss"]
    assert validation_loss(model, tokenizer, "cpu") == pytest.approx(recorded, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "chance"), [("world_category", 1 / 6), ("world_topic", 1 / 6), ("world_season", 1 / 4)]
)
def test_the_model_is_above_chance_before_any_tuning(name, chance, model, tokenizer):
    task = load_task(name)
    loss, accuracy = evaluate(task, model, encode(task, "validation", 200, tokenizer))
    assert math.isfinite(loss) and accuracy > chance + 0.05


def test_a_few_first_order_steps_teach_a_task(model, tokenizer):
    task = load_task("world_season")
    validation = encode(task, "validation", 100, tokenizer)
    before = evaluate(task, model, validation)[0]
    adam(task, model, encode(task, "train", 400, tokenizer), steps=25, lr=3e-4)
    assert evaluate(task, model, validation)[0] < 0.7 * before


def test_pretraining_twice_with_one_seed_gives_the_same_weights(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("l2l.world.pretrain.build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr("l2l.world.pretrain.validation_loss", lambda *_: 0.0)
    for name in ("a", "b"):
        main(["--out", str(tmp_path / name), "--steps", "2", "--tokens", "128", "--hidden", "32", "--layers", "1"])
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "argv",
    [["--out", "x"], ["--out", "x", "--steps", "1", "--minutes", "1"], ["--out", "x", "--steps", "1", "--seed", "-1"]],
)
def test_contradicting_options_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        parse(argv)
    assert "--" in capsys.readouterr().err
