"""A tiny model, rows and arguments for the tests of trainers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from l2l.models.shapes import tiny_random

VOCABULARY = 64


def model(**options: Any) -> PreTrainedModel:
    return tiny_random("llama", vocab_size=VOCABULARY, **options)


def rows(count: int = 16, length: int = 6) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=draw).tolist()
    return [{"input_ids": one, "labels": one} for one in ids]


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    small = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return kind(output_dir=str(folder), **{**quiet, "dataloader_pin_memory": False, **small, **options})


class Steps(TrainerCallback):
    """Notes the exact loss and learning rate of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.lr: list[float] = []
        self.reports: list[Any] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        while not hasattr(optimizer, "report"):
            optimizer = optimizer.optimizer
        self.reports.append(optimizer.report)
        self.losses.append(optimizer.report.loss)
        self.lr.append(optimizer.report.lr[0])


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}


def same(one: torch.nn.Module | dict[str, torch.Tensor], other: torch.nn.Module | dict[str, torch.Tensor]) -> bool:
    a, b = (x if isinstance(x, dict) else weights(x) for x in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Its state is one for the process."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
