"""What a baseline owes: scores on the rows that a run reports on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from l2l.models.batching import Grouping
from l2l.tasks.base import Row, Task
from l2l.tasks.evaluate import Scores, evaluate
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import RunInputs


@dataclass(frozen=True)
class Found:
    """What a baseline was measured to do."""

    initial: Scores
    """Of the model as it comes, on the train rows that runs report on."""
    train: Scores
    """Of the baseline, on the same rows."""
    dev: Scores
    test: Scores
    passes: int = 0
    """Forward passes over batches of train rows that it took to make it."""
    trained: int = 0
    """Coordinates fitted; none of them belongs to the model."""
    note: str = ""
    """Says in one sentence what the figures depend on that a reader would not expect."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further figures, for the summary."""


class Baseline(ABC):
    """Abstract baseline: a frozen dataclass whose fields are what ``method_args`` may set."""

    @abstractmethod
    def measure(self, ground: RunInputs, config: FineTuneConfig) -> Found:
        """Make and score it; the model is left as it came.

        Raises:
            ValueError: it means nothing for this task or model.
        """


def sampled(ground: RunInputs, config: FineTuneConfig) -> list[Row]:
    """The train rows that a run reports on."""
    return ground.splits.train[: config.test_size]


def scored(ground: RunInputs, config: FineTuneConfig, rows: Sequence[Row], task: Task | None = None) -> Scores:
    """Scores of the model as it stands, as a run's evaluations give them; of another task where one is given."""
    return evaluate(
        ground.model,
        ground.tokenizer,
        task or ground.task,
        rows,
        max_length=config.max_length,
        grouping=Grouping.of(ground.model, config.length_groups, config.share_prompts),
        max_new_tokens=config.max_new_tokens,
    )
