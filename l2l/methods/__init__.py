"""Published methods, one file each. The import path is the registry: ``mezo`` is ``l2l.methods.mezo``."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from importlib import import_module
from typing import Any

from l2l.methods.base import FirstOrder, Method

_NO_METHODS = ("base", "registry", "wrappers")


def method_names() -> list[str]:
    """Names that :func:`method_class` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_METHODS)


def is_first_order(name: str) -> bool:
    """Whether the method here of that name goes by backpropagation."""
    return name in method_names() and issubclass(method_class(name), FirstOrder)


def method_class(name: str) -> type[Method[Any]] | type[FirstOrder[Any]]:
    """The method class of a name here (``mezo``) or of a module elsewhere (``my_package.my_method``).

    Raises:
        ValueError: no such module, or it does not define exactly one method.
    """
    path = name if "." in name else f"{__name__}.{name}"
    if "." not in name and name not in method_names():
        near = difflib.get_close_matches(name, method_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}; known are {', '.join(method_names())}{hint}")
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"method {name!r}: no module {path!r} can be imported") from error
    found = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Method | FirstOrder)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"module {path!r} defines {len(found)} methods; one file holds one method")
    return found[0]
