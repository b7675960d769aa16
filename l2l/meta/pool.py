"""The task pool: one source of batches per task, and which task an outer step takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from l2l.estimators import Closure
from l2l.models.batching import Grouping
from l2l.tasks import Row, Task, batch_loss, get_task, load_splits
from l2l.tasks.encode import Batch, encoder_for
from l2l.tasks.inspect import warn_of_problems
from l2l.train.inputs import Batcher
from l2l.tuners.api import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from l2l.meta.config import MetaTrainConfig

_TASKS = 3
"""Sets the random stream of sampled tasks apart from that of batches."""
_AT_ONCE = 4096


@dataclass(frozen=True)
class PoolTask:
    """A task of the pool, or one to validate on."""

    task: Task
    batcher: Batcher
    dev: list[Row]

    def loss(self, model: nn.Module, batch: Batch) -> Closure:
        """Closure of the task's loss on a batch."""
        return partial(batch_loss, model, batch, self.batcher.form)


@dataclass(frozen=True)
class MetaInputs:
    """What meta-training works on."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    tuner: Tuner
    pool: list[PoolTask]
    validation: list[PoolTask]
    frozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters to make trainable again afterwards."""


def load_pool(
    names: Sequence[str],
    config: "MetaTrainConfig",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> list[PoolTask]:
    """Load and encode the tasks."""
    found, encoder = [], encoder_for(model)
    grouping, pad_id = Grouping.of(model, config.length_groups, config.share_prompts), encoder.pad_id(tokenizer)
    for name in names:
        task = get_task(name)
        splits = load_splits(task, config.data_dir, config.train_size, config.dev_size, 0, config.seed)
        encoded = encoder.encode(task, splits.train, tokenizer, max_length)
        warn_of_problems(task, splits, tokenizer, max_length, model)
        batcher = Batcher(encoded, task.form, pad_id, config.batch_size, config.seed, model.device, grouping)
        found.append(PoolTask(task, batcher, splits.dev))
    return found


def sampled_task(step: int, weights: tuple[float, ...], seed: int) -> tuple[int, int]:
    """(task, which of its batches) of outer step ``step`` where tasks are sampled by weight.

    A task's batches are numbered by how often it was sampled before, so none is skipped. A pure function: resuming needs
    no state. ValueError where a weight is negative or not finite, or all are zero.
    """
    tasks = _sampled_tasks(-(-(step + 1) // _AT_ONCE) * _AT_ONCE, weights, seed)
    return int(tasks[step]), int(np.count_nonzero(tasks[:step] == tasks[step]))


@lru_cache(maxsize=4)
def _sampled_tasks(count: int, weights: tuple[float, ...], seed: int) -> np.ndarray:
    """The tasks of the first ``count`` outer steps; a longer list begins with the shorter."""
    bounds = np.cumsum(check_weights(weights))
    uniform = np.random.default_rng((seed, _TASKS)).random(count)
    return np.minimum(np.searchsorted(bounds / bounds[-1], uniform, side="right"), len(weights) - 1)


def check_weights(weights: Sequence[float]) -> np.ndarray:
    """The weights as an array; raises ValueError, naming them, where tasks cannot be sampled by them."""
    values = np.asarray(weights, dtype=np.float64)
    if not np.all((values >= 0) & np.isfinite(values)) or not values.sum() > 0:
        raise ValueError(f"task_weights={list(weights)} must be finite and not negative, and at least one positive")
    return values
