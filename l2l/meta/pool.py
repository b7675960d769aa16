"""The task pool: one source of batches per task, taken in turn or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from l2l.models.batching import Grouping
from l2l.tasks import get_task
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import encoder_for
from l2l.tasks.rows import load_splits
from l2l.train.inputs import Batcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from l2l.meta.config import MetaTrainConfig


@dataclass(frozen=True)
class PoolTask:
    """A task of the pool, or one to validate on."""

    task: Task
    feeder: Batcher
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
    found, reader = [], encoder_for(model)
    grouping = Grouping.of(model, config.length_groups, config.share_prompts)
    for name in names:
        task = get_task(name)
        splits = load_splits(task, config.data_dir, config.train_size, config.dev_size, 0, config.seed)
        encoded = reader.encode(task, splits.train, tokenizer, max_length)
        pad_id = reader.pad_id(tokenizer)
        feeder = Batcher(encoded, task.form, pad_id, config.batch_size, config.seed, model.device, grouping)
        found.append(PoolTask(task, feeder, splits.dev))
    return found


def turn(step: int, tasks: int) -> tuple[int, int]:
    """(which task, which of its batches) serves outer step ``step``: each task once per round."""
    return step % tasks, step // tasks


_TASKS = 3
"""Word that sets the stream of drawn tasks apart from those of batches."""

_AT_ONCE = 4096


def drawn(step: int, weights: tuple[float, ...], seed: int) -> tuple[int, int]:
    """(which task, which of its batches) serves outer step ``step`` where tasks are drawn by weight.

    A task's batches are numbered by how often it was drawn before, so none is passed over. A pure function: resuming needs
    no state.

    Raises:
        ValueError: a weight is negative or not finite, or all are zero.
    """
    tasks = _tasks_drawn(-(-(step + 1) // _AT_ONCE) * _AT_ONCE, weights, seed)
    return int(tasks[step]), int(np.count_nonzero(tasks[:step] == tasks[step]))


@lru_cache(maxsize=4)
def _tasks_drawn(count: int, weights: tuple[float, ...], seed: int) -> np.ndarray:
    """The tasks of the first ``count`` outer steps; a longer list begins with the shorter."""
    bounds = np.cumsum(check_weights(weights))
    uniform = np.random.default_rng((seed, _TASKS)).random(count)
    return np.minimum(np.searchsorted(bounds / bounds[-1], uniform, side="right"), len(weights) - 1)


def check_weights(weights: Sequence[float]) -> np.ndarray:
    """The weights as an array; raises ValueError, naming the value, where tasks cannot be drawn by them."""
    values = np.asarray(weights, dtype=np.float64)
    if not np.all((values >= 0) & np.isfinite(values)) or not values.sum() > 0:
        raise ValueError(f"task_weights={list(weights)} must be finite and not negative, and at least one positive")
    return values
