"""What an optimizer is given in each step: the objective on the step's examples, whole or from pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, final

from torch import Tensor

from l2l.estimators.base import Closure
from l2l.estimators.micro import MicroBatched
from l2l.finetune.batches import Feeder, batch_indices, further_indices
from l2l.finetune.config import FineTuneConfig
from l2l.finetune.objectives import LOSS, Objective, find_objective
from l2l.methods.base import FirstOrder
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import Batch, Encoded
from l2l.tasks.losses import batch_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Closures:
    """The closures of a run, by step; which examples a step sees depends on the feeder alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    feeder: Feeder
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
    feeder: Feeder,
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
