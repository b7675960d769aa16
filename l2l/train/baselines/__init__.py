"""What a model does without steps: one baseline per file. The import path is the registry: ``icl`` is this package's."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from l2l.train.baselines.base import Baseline

_NO_BASELINE = ("base", "measure")


def baseline_names() -> list[str]:
    """Names that :func:`build_baseline` knows; ``--method`` takes them beside those of methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_BASELINE)


def baseline_kind(name: str) -> type[Baseline]:
    """The class of the baseline of that name."""
    classes = (value for _, value in inspect.getmembers(import_module(f"{__name__}.{name}"), inspect.isclass))
    return next(kind for kind in classes if issubclass(kind, Baseline) and not inspect.isabstract(kind))


def build_baseline(name: str, args: Mapping[str, Any], tuner: object = None) -> Baseline:
    """The baseline of that name.

    Raises:
        ValueError: it has no such argument, a value is out of range, or there is a tuner.
    """
    kind: Any = baseline_kind(name)
    known = sorted(field.name for field in fields(kind))
    unknown = sorted(set(args) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"method {name!r} has no argument {unknown[0]!r}; {has}")
    if tuner is not None:
        raise ValueError(f"method {name!r} takes no tuner: leave it out, or use method learned")
    return kind(**args)
