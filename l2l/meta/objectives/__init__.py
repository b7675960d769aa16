"""Meta-objectives: what a tuner can be trained for. :data:`OBJECTIVES` names those of the package; any other is named by the
module that defines it: ``my_package.my_objective``, or a file of this folder by its name."""

import difflib
import inspect
from importlib.util import find_spec
from typing import Any

from l2l.aliases import renamed
from l2l.meta.objectives.closed_forms import Expected, ExpectedCurvature, LogProgressRate
from l2l.meta.objectives.evolution import ESFullRun, Evolution
from l2l.meta.objectives.one_step_loss import HeldOutLoss, OneStepLoss, UnrolledLoss
from l2l.meta.state import Objective
from l2l.plugins import load_module

OBJECTIVES: dict[str, type[Objective]] = {
    "one_step_loss": OneStepLoss,
    "held_out_loss": HeldOutLoss,
    "unrolled_loss": UnrolledLoss,
    "expected": Expected,
    "expected_curvature": ExpectedCurvature,
    "log_progress_rate": LogProgressRate,
    "evolution": Evolution,
    "es_full_run": ESFullRun,
}
"""Name -> class."""


def make_objective(name: str, **args: Any) -> Objective:
    """The objective of a name in :data:`OBJECTIVES`, or of a module elsewhere (``my_package.my_objective``).

    Args:
        args: its own fields, e.g. ``steps=8`` of ``unrolled_loss``.

    Raises:
        ValueError: no such objective, or it has no such argument or value.
    """
    known = renamed({"objective": name}, ("objective",))["objective"]
    kind = OBJECTIVES.get(known) or _defined_in(known)
    try:
        inspect.signature(kind).bind(**args)
    except TypeError as error:
        known = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ValueError(f"objective_args of {name!r}: {error}; its arguments are: {known}") from error
    return kind(**args)


def _defined_in(name: str) -> type[Objective]:
    path = name if "." in name else f"{__name__}.{name}"
    if path != name and find_spec(path) is None:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown objective {name!r}; known are {', '.join(sorted(OBJECTIVES))}{hint}")
    module = load_module(path, f"objective {name!r}")
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    found = [value for value in classes if issubclass(value, Objective) and not inspect.isabstract(value)]
    if len(found) != 1:
        raise ValueError(f"module {path!r} defines {len(found)} objectives; name a module that defines one")
    return found[0]
