"""Tasks: rows, prompts, options and metrics; their encoding for a model, losses and evaluation."""

from l2l.tasks.base import Task
from l2l.tasks.registry import get_task, task_names

__all__ = ["Task", "get_task", "task_names"]
