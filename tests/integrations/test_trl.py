"""ZOSFTTrainer: TRL's data preparation, and steps by forward passes alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trainers import Steps, arguments, logged, same, weights

import l2l

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: it comes with the extra 'trl'"),
    pytest.mark.filterwarnings("default"),  # TRL and peft warn of what later versions of each other and transformers change
]

TEMPLATE = "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' . ' }}{% endfor %}"
CHATS = [
    ("where is the lamp ?", "in the kitchen"),
    ("where is the rope ?", "in the cellar"),
    ("where is the pillow ?", "in the hallway"),
    ("where is the basket ?", "in the stable"),
    ("where is the plow ?", "in the barn"),
    ("where is the cup ?", "in the bathroom"),
    ("where is the spoon ?", "in the office"),
    ("where is the hammer ?", "in the workshop"),
    ("where is the book ?", "in the garden"),
    ("where is the coat ?", "in the attic"),
]


def chats() -> Dataset:
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in CHATS]
    )


def trainer(folder: Path, callbacks: Any = None, zo: Any = None, eval_dataset: Any = None, **options: Any) -> Any:
    from trl import SFTConfig

    from l2l.integrations import ZOSFTTrainer

    tokenizer = l2l.load_tokenizer("l2l/tiny")
    tokenizer.chat_template = TEMPLATE
    own = {"per_device_train_batch_size": 5, "learning_rate": 5e-4, "bf16": False, "max_length": 32}
    args = arguments(folder, SFTConfig, **{**own, **options})
    given = {"model": l2l.load_model("l2l/tiny"), "args": args, "train_dataset": chats(), "processing_class": tokenizer}
    return ZOSFTTrainer(**given, zo=zo, callbacks=callbacks, eval_dataset=eval_dataset)


def test_ten_chats_with_a_template_are_learned(tmp_path: Path):
    found = trainer(tmp_path, max_steps=20, eval_dataset=chats())
    before = found.evaluate()["eval_loss"]
    found.train()
    assert found.evaluate()["eval_loss"] < 0.95 * before
    assert logged(found)[-1] < logged(found)[0]
    # Losses of training are told from those of evaluation by the model's own flag.
    assert len(logged(found, "mean_token_accuracy")) == 20
    assert len(logged(found, "eval_mean_token_accuracy")) == 1  # train() begins a history of its own


def test_a_run_resumes_to_the_same_bits(tmp_path: Path):
    own = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, callbacks=[every := Steps()], **own)
    whole.train()
    rest = trainer(tmp_path, callbacks=[last := Steps()], **own)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last.losses == every.losses[2:]
    assert same(whole.model, rest.model)


def test_accumulation_follows_trls_own_scaling_of_the_loss(tmp_path: Path):
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        trainer(tmp_path, callbacks=[seen := Steps()], train_sampling_strategy="sequential", **sizes).train()
        found.append(seen.losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_defaults_of_trl_are_taken(tmp_path: Path):
    """bf16 and activation checkpointing are on: evaluations compute in bfloat16, and nothing is recomputed."""
    found = trainer(tmp_path, bf16=None, max_steps=2)
    before = weights(found.model)
    found.train()
    assert found.args.bf16
    assert found.zo_optimizer.theta.mode == "functional"
    assert not same(before, found.model)
    assert all(torch.isfinite(torch.tensor(logged(found))))


def test_making_a_trainer_asks_for_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trl.trainer import base_trainer

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **_: pytest.fail("TRL reported to its hub"))
    trainer(tmp_path)
