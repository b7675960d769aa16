"""The embedded model loads offline, is small, knows the world, and pretraining is repeatable."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2l.models import shapes as tiny_random
from l2l.tasks.closure import batch_loss
from l2l.tasks.evaluate import evaluate
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import prepare_fine_tuning
from l2l.world.pretrain import main, parse, validation_loss

MODEL = Path(tiny_random.__file__).parent / "tiny"


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
def test_the_model_is_above_chance_before_any_tuning(name, chance):
    parts = prepare_fine_tuning(FineTuneConfig(task=name, test_size=200))
    scores = evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test)
    assert math.isfinite(scores.loss) and scores.value > chance + 0.05


def test_a_few_first_order_steps_teach_a_task():
    parts = prepare_fine_tuning(FineTuneConfig(task="world_season", test_size=100))
    before = evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test).loss
    adam = torch.optim.Adam(parts.model.parameters(), lr=3e-4)
    for step in range(25):
        adam.zero_grad()
        batch_loss(parts.model, parts.feeder.at(step), parts.feeder.form).backward()
        adam.step()
    assert evaluate(parts.model, parts.tokenizer, parts.task, parts.splits.test).loss < 0.7 * before


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


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--out", str(tmp_path), "--steps", "1"])
    assert str(tmp_path) in capsys.readouterr().err
