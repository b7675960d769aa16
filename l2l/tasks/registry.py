"""Tasks by name: ``sst2``, ``sst2@1`` to require a version, ``sst2:empty`` for a variant, or the path of a YAML file.

The tasks of the package are what the modules of ``l2l.tasks.hub`` and ``l2l.tasks.tiny_world`` define: a module's
``TASK``, or its ``TASKS``. These modules import nothing heavy, so all of them are read the first time that a name is
looked up.
"""

import difflib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

from l2l.tasks import hub, tiny_world
from l2l.tasks.base import Task

_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<version>[^@:]*))?(?::(?P<variant>[^@:]*))?(?:@(?P<late>[^@:]*))?")
"""The version may stand before the variant or after it."""


@dataclass(frozen=True)
class TaskName:
    """The parts of a task's name."""

    name: str
    version: int | None = None
    """``None``: whichever there is."""
    variant: str = ""
    """Empty: the usual prompt."""


def get_task(name: str) -> Task:
    """The task of that name, with version and variant as named, or the task of a YAML file.

    A name that ends in ``.yaml`` or ``.yml`` is the path of a task file, of the package's kind (:mod:`l2l.tasks.yaml_task`) or
    of lm-evaluation-harness (:mod:`l2l.tasks.harness`).

    Raises:
        FileNotFoundError: there is no such task file, or a data file that it names is absent.
        ValueError: there is no such task, and the message lists those there are; or the task file is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        from l2l.tasks.harness import read_task_file  # with jinja2, which other tasks do without

        return read_task_file(Path(name), reserved=task_names())
    wanted, tasks = parse_name(name), _tasks()
    if wanted.name not in tasks:
        near = difflib.get_close_matches(wanted.name, tasks, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown task {wanted.name!r}{hint}; known tasks: {', '.join(tasks)}")
    task = tasks[wanted.name]
    if wanted.version not in (None, task.version):
        raise ValueError(
            f"task {task.name!r} has version {task.version} here, not {wanted.version}; figures of different versions "
            f"do not compare: ask for '{task.name}@{task.version}', or install the release that has "
            f"'{task.name}@{wanted.version}'"
        )
    if not wanted.variant:
        return task
    if wanted.variant not in task.variants:
        known = ", ".join(f"'{task.name}:{variant}'" for variant in task.variants)
        raise ValueError(f"task {task.name!r} has no variant {wanted.variant!r}; it has {known or 'none'}")
    # A variant has another prompt, so the usual one's context-less form does not belong to it.
    return replace(task, example=task.variants[wanted.variant], variant=wanted.variant, contextless=None)


def task_names() -> list[str]:
    """Names of all tasks of the package, sorted."""
    return list(_tasks())


@cache
def _tasks() -> Mapping[str, Task]:
    """All tasks of the package by name, sorted by it."""
    found: dict[str, Task] = {}
    for package in (hub, tiny_world):
        for info in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{info.name}")
            for task in (*getattr(module, "TASKS", ()), *([module.TASK] if hasattr(module, "TASK") else ())):
                if task.name in found:
                    raise ValueError(f"{module.__name__} defines a second task {task.name!r}; give it another name")
                found[task.name] = task
    return dict(sorted(found.items()))


def parse_name(text: str) -> TaskName:
    """Split ``name``, ``name@version``, ``name:variant`` or ``name@version:variant`` into its parts.

    Raises:
        ValueError: the text has another form, or the version is not a whole number.
    """
    found = _NAME.fullmatch(text)
    if found is None or (found["version"] is not None and found["late"] is not None) or found["variant"] == "":
        raise ValueError(f"task {text!r}: a task is named as in 'sst2', 'sst2@1', 'sst2:empty' or 'sst2@1:empty'")
    version = found["version"] if found["late"] is None else found["late"]
    if version is not None and not (version.isascii() and version.isdecimal()):
        raise ValueError(f"task {text!r}: the version must be a whole number, as in 'sst2@1', not {version!r}")
    return TaskName(found["name"], None if version is None else int(version), found["variant"] or "")
