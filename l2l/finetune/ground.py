"""What every run stands on, whether it trains or only measures: model, tokenizer, task and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2l.finetune.config import FineTuneConfig
from l2l.models.load import load_model, load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.base import Task
from l2l.tasks.rows import Splits, load_splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunInputs:
    """Loaded, and not yet touched."""

    model: PreTrainedModel
    """In eval mode: two looks at one batch must not differ by dropout."""
    tokenizer: PreTrainedTokenizerBase
    task: Task
    splits: Splits


def load_run_inputs(
    config: FineTuneConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> RunInputs:
    """Load what is not given.

    Raises:
        ValueError, FileNotFoundError: task, rows, model or tokenizer cannot be had; the message says which.
    """
    task = get_task(config.task)
    splits = load_splits(task, config.data_dir, config.train_size, config.dev_size, config.test_size, config.seed)
    if model is None:
        labels = len(task.example(splits.train[0]).options)
        model = load_model(config.model, num_labels=labels, **config.loading())
    if tokenizer is None:
        source = model.config._name_or_path or config.model
        tokenizer = load_tokenizer(source, config.revision, config.trust_remote_code)
    model.eval()
    return RunInputs(model, tokenizer, task, splits)
