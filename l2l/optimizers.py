"""Every zeroth-order method as a torch optimizer under its own name: ``l2l.FZOO(model, lr=1e-6)``, ``l2l.optim.HiZOO(model)``.

The optimizer of a method is made from the method's class when its name is first asked for: adding a method file adds its
optimizer. It is named as the class, and that of the learned method ``ZOFineTuner``. All have one signature: the model (and the
tuner, where the method needs one), ``lr``, ``epsilon``, ``seed``, ``weight_decay``; by keyword, the method's fields and the
options of :class:`l2l.optim.ZOOptimizer`.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from docstring_parser import parse_from_object
from torch import nn

from l2l.aliases import renamed
from l2l.methods import is_first_order, method_class, method_names
from l2l.optim import DEFAULT_LR, LearningRate, ZOOptimizer
from l2l.tuners import Level, Tuner

_NAMES = {"learned": "ZOFineTuner"}
"""Method -> name of its optimizer, where that is not the name of its class."""

_OPTIONS = (("lr", DEFAULT_LR, LearningRate), ("epsilon", 1e-3, float), ("seed", 0, int), ("weight_decay", 0.0, float))


def optimizer_names() -> list[str]:
    """Names of all optimizers, of which :func:`optimizer` gives one."""
    return sorted(_NAMES.get(name, method_class(name).__name__) for name in method_names() if not is_first_order(name))


def optimizer(name: str) -> Callable[..., ZOOptimizer]:
    """The optimizer of that name (``FZOO``), which takes a model and gives a :class:`l2l.optim.ZOOptimizer`.

    Raises:
        AttributeError: there is none.
    """
    methods = {_NAMES.get(method, method.replace("_", "")).lower(): method for method in method_names()}
    method = methods.get(name.lower())
    if method is None or is_first_order(method) or name not in (_NAMES.get(method), method_class(method).__name__):
        raise AttributeError(f"module 'l2l' has no attribute {name!r}; optimizers are named as dir(l2l) lists them")
    return _constructor(method_class(method), name)


@cache
def _constructor(kind: type[Any], name: str) -> Callable[..., ZOOptimizer]:
    own = inspect.signature(kind).parameters
    fields = [field for field in own.values() if field.name not in ("epsilon", "tuner")]
    options = list(inspect.signature(ZOOptimizer).parameters.values())[5:]  # after model, method, lr, seed, weight_decay
    first = [Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, annotation=nn.Module)]
    if "tuner" in own:
        first.append(Parameter("tuner", Parameter.POSITIONAL_OR_KEYWORD, annotation=Tuner))
        options.append(Parameter("match", Parameter.KEYWORD_ONLY, default="exact", annotation=Level))
    defaults = {name: default for name, default, _ in _OPTIONS} | ({} if kind.default_lr is None else {"lr": kind.default_lr})
    first += [Parameter(a, Parameter.POSITIONAL_OR_KEYWORD, default=defaults[a], annotation=c) for a, _, c in _OPTIONS]
    keywords = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*fields, *options)]
    signature = Signature([*first, *keywords], return_annotation=ZOOptimizer)

    def construct(*args: Any, **kwargs: Any) -> ZOOptimizer:
        given = signature.bind(*args, **renamed(kwargs, signature.parameters)).arguments
        model = given.pop("model")
        if "tuner" in given:
            given["tuner"] = given["tuner"].matched(model, given.pop("match", "exact"))
        method = kind(**{field: given.pop(field) for field in own if field in given})
        return ZOOptimizer(model, method, **given)

    construct.__name__ = construct.__qualname__ = name
    construct.__module__ = __name__
    construct.__doc__ = _document(kind, [field.name for field in fields])
    construct.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    construct.method_class = kind  # pyright: ignore[reportFunctionMemberAccess]
    return construct


def _document(kind: type[Any], fields: list[str]) -> str:
    """The method's docstring with its paper, and its fields with theirs."""
    said: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        with suppress(OSError, TypeError):  # no source: a class of an interactive session
            said |= {param.arg_name: param.description or "" for param in parse_from_object(one).params}
    about = f"{kind.info.paper}. Kept between steps: {kind.info.memory}. See :class:`{kind.__module__}.{kind.__qualname__}`."
    lines = [f"    {field}: {' '.join(said.get(field, '').split())}".rstrip() for field in fields]
    return "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", about, "", "Args:", *lines, _REST])


_REST = """    model, lr, epsilon, seed, weight_decay and all others: see :class:`l2l.optim.ZOOptimizer`.
    tuner, match: sets sigma; how alike the model must be to the tuner's own (:func:`l2l.tuners.transfer.matched`).

Raises:
    ValueError: a value out of range, or a tuner that was made for another model."""
