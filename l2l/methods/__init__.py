"""Published methods, one file each. The import path is the registry: ``mezo`` is ``l2l.methods.mezo``."""

import difflib
import inspect
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from l2l.methods.base import FirstOrder, Method
from l2l.plugins import load_module

_NO_METHODS = ("base", "registry", "wrappers")


def method_names() -> list[str]:
    """Names that :func:`method_class` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_METHODS)


def is_first_order(name: str) -> bool:
    """Whether the method of that name in this package uses backpropagation alone."""
    return name in method_names() and issubclass(method_class(name), FirstOrder)


def default_lr(name: str) -> float | None:
    """Learning rate that the method of that name (``rsgn``, ``sparse+rsgn``) needs no tuning of; None where it has none."""
    *_, inner = name.split("+")
    return getattr(method_class(inner), "default_lr", None) if inner in method_names() or "." in inner else None


def method_class(name: str) -> type[Method[Any]] | type[FirstOrder[Any]]:
    """The method class of a name here (``mezo``), of a module (``my_package.my_method``), or of a file (``./mine.py``).

    Raises:
        ValueError: no such module or file, it cannot be imported, or it does not define exactly one method.
    """
    path = name if "." in name else f"{__name__}.{name}"
    if "." not in name and name not in method_names():
        raise ValueError(f"unknown method {name!r}; known are {known_names(name, method_names())}")
    return only_class(load_module(path, f"method {name!r}"), "method", Method, FirstOrder)


def known_names(name: str, known: Sequence[str]) -> str:
    """The known names, and the one nearest to ``name``: the end of an error message."""
    near = difflib.get_close_matches(name, known, n=1)
    return ", ".join(known) + (f"; did you mean {near[0]!r}?" if near else "")


def only_class(module: ModuleType, kind: str, *bases: type) -> Any:
    """The one concrete subclass of ``bases`` that a module defines.

    Raises:
        ValueError: it defines none, or several.
    """
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    found = [value for value in classes if issubclass(value, bases) and not inspect.isabstract(value)]
    if len(found) != 1:
        raise ValueError(f"module {module.__name__!r} defines {len(found)} {kind}s; one file holds one {kind}")
    return found[0]
