"""What there is to choose from: methods, what can be put around them, and baselines, with cost and origin."""

from __future__ import annotations

from typing import Any

from torch import nn

from l2l.methods import is_first_order, method_class, method_names
from l2l.methods.base import Method
from l2l.methods.registry import build_method
from l2l.methods.wrappers import AROUND, wrapper_class, wrapper_names
from l2l.optim import FIRST_ORDER_PASSES
from l2l.train.baselines import baseline_kind, baseline_names
from l2l.tuners.api import Tuner


def method_list() -> list[dict[str, str]]:
    """A row per method, by name: what it is, forward passes per step by default, extra memory, paper.

    Memory is in copies of the trained weights (``1P``), kept between steps. Rows of enhancements begin with ``…+``.
    """
    rows = [_row(name, name, method_class(name)) for name in method_names()]
    rows += [_row(f"{name}{AROUND}…", f"{name}{AROUND}mezo", wrapper_class(name)) for name in wrapper_names()]
    return rows + [_named(name, baseline_kind(name)) | {"passes": "-", "memory": "-"} for name in baseline_names()]


def _row(shown: str, name: str, kind: Any) -> dict[str, str]:
    passes = float(FIRST_ORDER_PASSES) if is_first_order(name) else _passes(name)
    return _named(shown, kind) | {"passes": f"{passes:g}", "memory": kind.info.memory, "paper": kind.info.paper}


def _named(name: str, kind: Any) -> dict[str, str]:
    first = (kind.__doc__ or "").splitlines()[0]
    return {"method": name, "what": first.partition(" Extra memory:")[0]}


def _passes(name: str) -> float:
    """Of a step with the default arguments; a fresh tuner stands for any."""
    model = nn.Linear(2, 2)
    tuner = Tuner.for_model(model) if "learned" in name.split(AROUND) else None
    method = build_method(name, 1e-3, {}, tuner, model)
    assert isinstance(method, Method), "first-order methods are told apart before"
    return method.passes
