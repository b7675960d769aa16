"""What can be put around any method, one file each: ``sparse+learned+lozo`` is a mask around a tuner around LOZO.

The import path is the registry: ``sparse`` is ``l2l.methods.wrappers.sparse``. An enhancement is a method whose first field,
``inner``, is the method that it is put around."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from l2l.methods.base import CustomEstimator

AROUND = "+"
"""Between the names of enhancements and the method that they are put around, the outermost first."""


def wrapper_names() -> list[str]:
    """Names that :func:`enhancement_class` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def wrapper_class(name: str) -> type[CustomEstimator[Any]]:
    """The class of an enhancement of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in wrapper_names():
        near = difflib.get_close_matches(name, wrapper_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(wrapper_names())
        raise ValueError(f"{name!r} can be put around no method; known enhancements are {known}{hint}")
    module = import_module(f"{__name__}.{name}")
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    return next(kind for kind in classes if issubclass(kind, CustomEstimator))


def split_method_name(name: str) -> tuple[list[str], str]:
    """(enhancements, the outermost first; the method) of a name such as ``sparse+learned+lozo``."""
    *around, method = name.split(AROUND)
    return around, method


def split_method_args(name: str, args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments by part of the name. Of a method alone they are given as they are, else by part: ``{lozo: {rank: 2}}``.

    Raises:
        ValueError: they name no part of it, or are no mapping.
    """
    around, method = split_method_name(name)
    if not around:
        return {method: dict(args)}
    parts = [*around, method]
    for part, own in args.items():
        if part not in parts or not isinstance(own, Mapping):
            raise ValueError(
                f"method_args of {name!r} are given by part, like {{{parts[-1]}: {{field: value}}}}; {part!r} is none of "
                f"{', '.join(parts)}, or holds no fields"
            )
    return {part: dict(args.get(part, {})) for part in parts}
