"""Tasks by name. The import path is the registry: a module here that defines ``TASK`` is a task."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
from functools import cache

from l2l.tasks.base import Task

__all__ = ["Task", "get_task", "task_names"]

_DEFINES_TASK = re.compile(r"^TASK\s*[:=]", re.MULTILINE)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown task {name!r}{hint}; known tasks: {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}").TASK


def task_names() -> list[str]:
    """Names of all tasks, sorted."""
    return list(_task_names())


@cache
def _task_names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if _is_task(module.name)))


def _is_task(name: str) -> bool:
    """Whether the module's source assigns ``TASK``. Reading it is cheaper than importing what helpers import."""
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    source = getattr(spec.loader, "get_source", None) if spec is not None else None
    text = source(f"{__name__}.{name}") if source is not None else None
    return text is not None and _DEFINES_TASK.search(text) is not None
