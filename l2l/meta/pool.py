"""The task pool: one source of batches per task, taken in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2l.finetune.batches import Feeder
from l2l.models.buckets import Grouping
from l2l.tasks import get_task
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import encode, padding_id
from l2l.tasks.rows import load_splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from l2l.meta.config import MetaTrainConfig


@dataclass(frozen=True)
class PoolTask:
    """A task of the pool, or one to validate on."""

    task: Task
    feeder: Feeder
    dev: list[Row]


def load_pool(
    names: Sequence[str],
    config: MetaTrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[PoolTask]:
    """Load and encode the tasks.

    Raises:
        ValueError, FileNotFoundError: an unknown task, missing or malformed data.
    """
    found, grouping = [], Grouping.of(model, config.length_groups)
    for name in names:
        task = get_task(name)
        splits = load_splits(task, config.data_dir, config.train_size, config.dev_size, 0, config.seed)
        encoded = encode(task, splits.train, tokenizer, max_length)
        pad_id = padding_id(tokenizer)
        feeder = Feeder(encoded, task.form, pad_id, config.batch_size, config.seed, model.device, grouping)
        found.append(PoolTask(task, feeder, splits.dev))
    return found


def turn(step: int, tasks: int) -> tuple[int, int]:
    """(which task, which of its batches) serves outer step ``step``: each task once per round."""
    return step % tasks, step // tasks
