"""Who takes part in a comparison: methods from their short forms, and that each chooses among as many step sizes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass

from l2l.compare.compare_config import ALL, BASELINE, CompareConfig, MethodEntry, SchemeEntry
from l2l.compare.config import Setting
from l2l.compare.protocol import Point
from l2l.finetune.baselines import baseline_names
from l2l.methods import method_class, method_names
from l2l.methods.base import Method


def plain_methods() -> list[str]:
    """Zeroth-order methods that come with the package and can be made without being told anything, by name."""
    return [name for name in method_names() if _is_plain(method_class(name))]


def _is_plain(kind: type) -> bool:
    needed = [
        one.name
        for one in (fields(kind) if is_dataclass(kind) else ())
        if one.init and one.default is MISSING and one.default_factory is MISSING
    ]
    return issubclass(kind, Method) and not needed


def contenders(config: CompareConfig) -> list[MethodEntry]:
    """Every entry of a comparison, in order.

    Raises:
        ValueError: nobody takes part, two entries have one label, a method that takes no steps, an exclusion or a
            baseline that nothing goes by.
    """
    given = config.methods.split(",") if isinstance(config.methods, str) else config.methods
    entries = [MethodEntry(entry.strip()) if isinstance(entry, str) else entry for entry in given]
    own = [entry for entry in entries if entry.method != ALL]
    labels = [entry.label for entry in own]
    if len(set(labels)) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise ValueError(f"two methods are called {twice!r}: give one of them a label of its own")
    found: dict[str, MethodEntry] = {}
    for entry in entries:
        names = _all_but(config.exclude) if entry.method == ALL else ()
        found |= {name: found.get(name, MethodEntry(name)) for name in names}
        if entry.method != ALL:
            found[entry.label] = entry
    _check(config, list(found.values()))
    return list(found.values())


def _all_but(excluded: Sequence[str]) -> list[str]:
    known = plain_methods()
    for name in excluded:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"exclude names {name!r}, which is not among the methods of 'all'{hint}")
    return [name for name in known if name not in excluded]


def _check(config: CompareConfig, entries: Sequence[MethodEntry]) -> None:
    if not entries:
        raise ValueError("no method takes part: name at least one under methods")
    for entry in entries:
        if entry.method in baseline_names():
            raise ValueError(f"method {entry.method!r} takes no steps, so it cannot be compared at equal passes")
    labels = [entry.label for entry in entries]
    if config.baseline not in labels and config.baseline != BASELINE:
        raise ValueError(f"baseline is {config.baseline!r}, which no method is called; there are {', '.join(labels)}")
    for setting in config.settings:
        _check_effort(config, setting, entries)


def _check_effort(config: CompareConfig, setting: Setting, entries: Sequence[MethodEntry]) -> None:
    """Refuse that one has more tries than another."""
    sizes = {entry.label: len(points(config, setting, config.tuning_schemes[0], entry)) for entry in entries}
    common = Counter(sizes.values()).most_common(1)[0][0]
    for label, size in sizes.items():
        if size != common:
            raise ValueError(
                f"method {label!r} would choose among {size} step sizes and others among {common} in setting "
                f"{setting.name!r}: tuning effort must be equal, so give it {common} (grid, or beta_grid for lr: auto)"
            )


def points(config: CompareConfig, setting: Setting, scheme: SchemeEntry, entry: MethodEntry) -> list[Point]:
    """The step sizes among which an entry chooses, small ones first.

    Raises:
        ValueError: a value is there twice.
    """
    if entry.auto:
        values = entry.grid or config.step_fraction_grid
    else:
        factor = entry.scale * scheme.scale
        values = [float(f"{value * factor:.6g}") for value in entry.grid or setting.grid or config.grid]
    if len(set(values)) < len(values):
        raise ValueError(f"method {entry.label!r} has a step size twice in its grid: {sorted(values)}")
    return [{"lr": "auto", "beta": value} if entry.auto else {"lr": value} for value in sorted(values)]
