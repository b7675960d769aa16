"""Baselines that take no steps: one file each in this package, found by its name (``icl``: ``l2l.train.baselines.icl``)."""

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any

from l2l.methods.registry import method_list
from l2l.models.batching import Grouping
from l2l.report.console import print_table
from l2l.tasks.evaluate import Scores
from l2l.train.inputs import RunInputs


@dataclass(frozen=True)
class BaselineScores:
    """The result of measuring a baseline."""

    initial: Scores
    """Of the untrained model, on the train rows that runs report on."""
    train: Scores
    """Of the baseline, on the same rows."""
    dev: Scores
    test: Scores
    passes: int = 0
    """Forward passes over batches of train rows that fitting took."""
    trained: int = 0
    """Fitted coordinates; none of them belongs to the model."""
    note: str = ""
    """One sentence on what the figures depend on that a reader would not expect."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further figures, for the summary."""


class Baseline(ABC):
    """Abstract baseline: a frozen dataclass whose fields are what ``method_args`` may set."""

    @abstractmethod
    def measure(self, inputs: RunInputs) -> BaselineScores:
        """Fit and score the baseline; the model is left unchanged.

        Raises:
            ValueError: it does not apply to this task or model.
        """


def grouping_of(inputs: RunInputs) -> Grouping:
    """How a run's evaluations lay out rows."""
    return Grouping.of(inputs.model, inputs.config.length_groups, inputs.config.share_prompts)


def baseline_names() -> list[str]:
    """Names that :func:`build_baseline` knows; ``--method`` takes them beside those of methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


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


def list_methods() -> None:
    """Print every method, wrapper and baseline as a table."""
    print_table("methods", method_list() + baseline_list())


def baseline_list() -> list[dict[str, str]]:
    """A row per baseline, like those of :func:`l2l.methods.registry.method_list`."""
    kinds = {name: baseline_kind(name) for name in baseline_names()}
    rows = [{"method": name, "what": (kind.__doc__ or "").splitlines()[0]} for name, kind in kinds.items()]
    return [row | {"passes": "-", "memory": "-"} for row in rows]
