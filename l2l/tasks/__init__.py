"""Tasks: rows, prompts, options and metrics; their encoding for a model, losses and evaluation."""

from l2l.tasks.base import Row, Task
from l2l.tasks.losses import BatchLogits, batch_loss
from l2l.tasks.metrics import answer_scores, format_interval
from l2l.tasks.registry import get_task, task_names
from l2l.tasks.rows import Splits, load_splits

__all__ = [
    "BatchLogits",
    "Row",
    "Splits",
    "Task",
    "answer_scores",
    "batch_loss",
    "format_interval",
    "get_task",
    "load_splits",
    "task_names",
]
