"""What a tuner may be trained for, one file each. The import path is the registry: ``l2l.meta.objectives.published``."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from importlib import import_module
from typing import Any

from l2l.meta.objectives.base import Objective


def objective_names() -> list[str]:
    """Names that :func:`make_objective` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def make_objective(name: str, **args: Any) -> Objective:
    """The objective of a name here (``published``) or of a module elsewhere (``my_package.my_objective``).

    Args:
        args: its own fields, e.g. ``steps=8`` of ``unrolled``.

    Raises:
        ValueError: no such module, it does not define exactly one objective, or that has no such argument or value.
    """
    kind = _objective_class(name)
    try:
        inspect.signature(kind).bind(**args)
    except TypeError as error:
        known = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ValueError(f"objective_args of {name!r}: {error}; its arguments are: {known}") from error
    return kind(**args)


def _objective_class(name: str) -> type[Objective]:
    if "." not in name and name not in objective_names():
        near = difflib.get_close_matches(name, objective_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown objective {name!r}; known are {', '.join(objective_names())}{hint}")
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"objective {name!r}: no module {path!r} can be imported") from error
    found = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Objective) and not inspect.isabstract(value) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"module {path!r} defines {len(found)} objectives; one file holds one objective")
    return found[0]
