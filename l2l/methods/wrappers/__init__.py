"""Wrappers around any method, one file each: ``sparse+learned+lozo`` is a mask around a tuner around LOZO.

The import path is the registry: ``sparse`` is ``l2l.methods.wrappers.sparse``, whose class extends
:class:`l2l.methods.base.Wrapper`."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from l2l.methods import known_names, only_class
from l2l.methods.base import Wrapper

AROUND = "+"
"""Between the names of wrappers and the method inside, the outermost first."""


def wrapper_names() -> list[str]:
    """Names that :func:`wrapper_class` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def wrapper_class(name: str) -> type[Wrapper[Any]]:
    """The wrapper class of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in wrapper_names():
        raise ValueError(f"{name!r} can be put around no method; known wrappers are {known_names(name, wrapper_names())}")
    return only_class(import_module(f"{__name__}.{name}"), "wrapper", Wrapper)


def split_method_args(name: str, args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments by part of the name. Those of a method alone are given directly, else by part: ``{lozo: {rank: 2}}``.

    Raises:
        ValueError: they name no part of it, or are no mapping.
    """
    *around, method = name.split(AROUND)
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
