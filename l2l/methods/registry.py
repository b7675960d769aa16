"""From what a user names to a method object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from torch import nn

from l2l.aliases import renamed
from l2l.methods import method_class
from l2l.methods.base import FirstOrder, Method
from l2l.methods.wrappers import AROUND, split_method_args, split_method_name, wrapper_class
from l2l.optim import DiZO, MeZO, ZOFineTuner
from l2l.tuners.api import Tuner
from l2l.tuners.transfer import Level

MethodLike: TypeAlias = str | Method[Any] | FirstOrder[Any] | Callable[..., Any]
"""``"mezo"``, a method object, or one of ``l2l.MeZO``, ``l2l.DiZO``, ``l2l.ZOFineTuner``. First-order baselines
(``"adamw"``, ``"sgd"``) come by name or as an object."""

_NAMES = {MeZO: "mezo", DiZO: "dizo", ZOFineTuner: "learned"}


def method_name(method: MethodLike) -> str:
    """The name a run records."""
    if isinstance(method, str):
        return method
    if isinstance(method, Method | FirstOrder):
        own = type(method).__module__.rpartition(".")[2]
        inner = getattr(method, "inner", None)
        return own if inner is None else f"{own}{AROUND}{method_name(inner)}"
    if method in _NAMES:
        return _NAMES[method]
    raise ValueError(f"method {method!r} is not a name, a method object, or one of l2l's optimizers")


def build_method(
    method: MethodLike,
    epsilon: float,
    args: Mapping[str, Any],
    tuner: Tuner | str | None,
    model: nn.Module,
    steps: int | None = None,
    match: Level = "exact",
) -> Method[Any] | FirstOrder[Any]:
    """The method object.

    Args:
        steps: that the run is to take: what a method that looks ahead takes for its ``horizon``, unless told one.
        match: how alike the model must be to the tuner's own; see :func:`l2l.tuners.transfer.matched`.

    Raises:
        ValueError: an unknown name or argument, a tuner missing, superfluous, or made for another model.
    """
    if isinstance(method, Method | FirstOrder):
        return method
    name = method_name(method)
    around, base = split_method_name(name)
    given = split_method_args(name, args)
    kinds: list[tuple[str, Any]] = [(base, method_class(base)), *((n, wrapper_class(n)) for n in reversed(around))]
    wanted = [n for n, kind in kinds if "tuner" in _fields(kind)]
    if tuner is None and wanted:
        raise ValueError(f"method {name!r} needs a tuner: give its directory, bundled name or hub id")
    if tuner is not None and not wanted:
        raise ValueError(
            f"method {name!r} takes no tuner: leave it out, or use method {'learned' if name == 'mezo' else 'learned+' + name}"
        )
    if around and issubclass(kinds[0][1], FirstOrder):
        raise ValueError(
            f"method {name!r}: a first-order method looks along no directions, and nothing can be put around it"
        )
    found: Any = None
    for part, kind in kinds:
        own = _checked(part, kind, given[part]) | ({} if found is None else {"inner": found})
        if "horizon" in _fields(kind):
            own = {"horizon": steps} | own
        if "tuner" in _fields(kind):
            loaded = Tuner.from_pretrained(tuner) if isinstance(tuner, str) else tuner
            assert loaded is not None, "refused above"
            own["tuner"] = loaded.matched(model, match)
        if "epsilon" in inspect.signature(kind).parameters:
            own = {"epsilon": epsilon} | own
        found = kind(**own)
    return found


def _fields(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}


def _checked(name: str, kind: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the part of a method has; ``inner`` is not for the user to give."""
    known = set(inspect.signature(kind).parameters) - {"inner"}
    args = renamed(args, known)
    unknown = sorted(set(args) - known)
    if unknown:
        raise ValueError(f"method {name!r} has no argument {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return dict(args)
