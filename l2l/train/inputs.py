"""Which examples a step sees: a pure function of (rows, batch size, seed, step), so that resuming needs no state.

What an optimizer is given in each step: the objective on the step's examples, whole or from pieces.

What every run stands on, whether it trains or only measures: model, tokenizer, task and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from l2l.estimators.finite_difference import Closure, MicroBatched
from l2l.methods.base import FirstOrder
from l2l.models.batching import Grouping
from l2l.models.load import load_model, load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import Batch, Encoded, Form, collate
from l2l.tasks.losses import batch_loss
from l2l.tasks.rows import Splits, load_splits
from l2l.train.config import FineTuneConfig
from l2l.train.objectives import LOSS, Objective, find_objective

_FURTHER = 1
"""Word that sets the stream of further batches apart from the epochs' permutations."""


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, epoch)).permutation(rows).tolist())


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of a step's batch: epochs without replacement, each in an order of its own, batches crossing their ends."""
    wanted = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(rows, seed, i // rows)[i % rows] for i in wanted]


def further_indices(rows: int, batch_size: int, seed: int, step: int, number: int) -> list[int]:
    """Indices of the ``number``-th further batch of a step, for methods that search on other batches than the step's."""
    generator = np.random.default_rng((seed, step, number, _FURTHER))
    return generator.choice(rows, size=batch_size, replace=rows < batch_size).tolist()


@final
@dataclass(frozen=True)
class Batcher:
    """Batches of encoded examples by step."""

    examples: Sequence[Encoded]
    form: Form
    pad_id: int
    batch_size: int
    seed: int
    device: torch.device | str = "cpu"
    grouping: Grouping = field(default_factory=Grouping)
    """How rows are laid out and split for feeding; which examples a step sees does not depend on it."""

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        return self._collate(batch_indices(len(self.examples), self.batch_size, self.seed, step))

    def further(self, step: int, number: int) -> Batch:
        """A further batch of the same step."""
        return self._collate(further_indices(len(self.examples), self.batch_size, self.seed, step, number))

    def _collate(self, indices: list[int]) -> Batch:
        batch = collate([self.examples[i] for i in indices], self.form, self.pad_id, grouping=self.grouping)
        return replace(batch, parts=self.grouping.split(batch)).to(self.device)


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Closures:
    """The closures of a run, by step; which examples a step sees depends on the feeder alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    feeder: Batcher
    rows: Sequence[Row]
    """The rows that the feeder's examples were made from, in the same order."""
    objective: Objective | None = None
    """None: the task's loss."""
    micro_batch: int | None = None
    """Most examples whose loss is computed at once; None: the whole batch."""

    def at(self, step: int) -> Closure:
        """The objective on a step's batch."""
        feeder = self.feeder
        if self._whole:
            return self._loss(feeder.at(step))
        return self._on(batch_indices(len(feeder.examples), feeder.batch_size, feeder.seed, step))

    def further(self, step: int, number: int) -> Closure:
        """The objective on a further batch of the same step."""
        feeder = self.feeder
        if self._whole:
            return self._loss(feeder.further(step, number))
        return self._on(further_indices(len(feeder.examples), feeder.batch_size, feeder.seed, step, number))

    def value(self, rows: Sequence[Row]) -> float | None:
        """The objective on any rows; None where it is the task's loss, which an evaluation gives anyway."""
        return None if self.objective is None else float(self.objective(self.model, self.tokenizer, rows))

    @property
    def _whole(self) -> bool:
        return self.objective is None and self.micro_batch is None

    def _on(self, indices: Sequence[int]) -> Closure:
        if self.objective is not None:
            return partial(self.objective, self.model, self.tokenizer, [self.rows[i] for i in indices])
        examples = [self.feeder.examples[i] for i in indices]
        size = self.micro_batch or len(examples)
        chunks = [examples[start : start + size] for start in range(0, len(examples), size)]
        total = self._weight(examples)
        return MicroBatched(tuple(self._piece(chunk, self._weight(chunk) / total) for chunk in chunks))

    def _weight(self, examples: Sequence[Encoded]) -> int:
        """What the mean of the task's loss is taken over: examples, or the tokens of their gold options."""
        if self.feeder.form == "classification":
            return len(examples)
        return sum(len(example.options[example.gold[0]].targets) for example in examples)

    def _piece(self, examples: Sequence[Encoded], share: float) -> Closure:
        # A feeder of these examples alone, whose first batch is all of them, lays them out as it does whole batches.
        batch = replace(self.feeder, examples=examples, batch_size=len(examples)).at(0)
        loss = self._loss(batch)
        return lambda: share * loss()

    def _loss(self, batch: Batch) -> Callable[[], Tensor]:
        return partial(batch_loss, self.model, batch, self.feeder.form)


def choose_closures(
    config: FineTuneConfig,
    method: object,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    feeder: Batcher,
) -> Closures:
    """The closures that a configuration asks for, on the train rows.

    Raises:
        ValueError: no such objective, one that the task has no answers or options for, or one without a gradient for a
            method that needs one.
    """
    if config.objective != LOSS and (isinstance(method, FirstOrder) or getattr(method, "differentiates", False)):
        raise ValueError(
            f"method {config.method!r} needs the gradient of what it minimises, and objective {config.objective!r} has "
            "none: use objective loss, or a method of forward passes"
        )
    objective = find_objective(
        config.objective,
        task,
        rows[0],
        config.max_length,
        config.max_new_tokens,
        config.micro_batch,
        feeder.grouping,
    )
    return Closures(model, tokenizer, feeder, rows, objective, config.micro_batch)


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
