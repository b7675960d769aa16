"""``l2l tuners diff A B``: what two tuners have in common and where they part."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from l2l.tuners.anatomy import sigma_by_kind, typical_sigma
from l2l.tuners.match import classify
from l2l.tuners.store import to_config
from l2l.tuners.tuner import Tuner

MOST = 5
"""Blocks that are named."""
APART = ("blocks", "format", "fingerprint")
"""Fields of the config that are compared in other ways."""


@dataclass(frozen=True)
class DiffConfig:
    """Compare two tuners: configs, sigma by kind, distance of weights, the blocks that differ most."""

    first: str
    """Directory, bundled or registered name, or hub id."""
    second: str
    """The other one."""
    most: int = MOST
    """Blocks to name."""


@dataclass(frozen=True)
class Difference:
    """From the first tuner to the second."""

    blocks: str
    """What the blocks of the second are to those of the first."""
    config: list[dict[str, str]]
    """Fields that differ: name, first, second."""
    sigma: list[dict[str, object]]
    """Per kind of block: median and largest typical sigma of both."""
    distance: float | None
    """Of the networks' weights, relative to the first; None where they have other shapes."""
    changes: list[dict[str, object]]
    """Common blocks whose sigma differs most: name, first, second, ratio."""


def difference(first: Tuner, second: Tuner, most: int = MOST) -> Difference:
    """Compare two tuners. Sigma is taken at ordinary weights and losses, see :mod:`l2l.tuners.anatomy`."""
    match = classify(first.fingerprint, second.fingerprint)
    first, second = _with_kinds(first, second), _with_kinds(second, first)
    return Difference(
        f"{match.kind}: {match.message}",
        config_changes(to_config(first), to_config(second)),
        _by_kind(first, second),
        distance(first, second),
        _largest(first, second, match.mapping, most),
    )


def _with_kinds(tuner: Tuner, other: Tuner) -> Tuner:
    """A tuner that was saved without kinds of blocks, with those that another one for the same blocks names."""
    kinds = dict(zip(other.fingerprint.names, other.fingerprint.kinds, strict=False))
    if tuner.fingerprint.kinds or not kinds or tuner.fingerprint.differences(other.fingerprint):
        return tuner
    found = copy(tuner)
    found.fingerprint = replace(tuner.fingerprint, kinds=tuple(kinds[name] for name in tuner.fingerprint.names))
    return found


def config_changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, str]]:
    """Fields of two configs that differ, nested ones by their dotted names, in the order of the first."""
    mine, theirs = _flat(first), _flat(second)
    names = [name for name in {**mine, **theirs} if mine.get(name, "-") != theirs.get(name, "-")]
    return [{"field": name, "first": mine.get(name, "-"), "second": theirs.get(name, "-")} for name in names]


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config.items():
        if above == "" and name in APART:
            continue
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = _brief(value)
    return found


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _by_kind(first: Tuner, second: Tuner) -> list[dict[str, object]]:
    mine, theirs = ({row.kind: row for row in sigma_by_kind(tuner)} for tuner in (first, second))
    return [
        {
            "kind": kind,
            "first median": mine[kind].median if kind in mine else "-",
            "second median": theirs[kind].median if kind in theirs else "-",
            "first largest": mine[kind].largest if kind in mine else "-",
            "second largest": theirs[kind].largest if kind in theirs else "-",
        }
        for kind in {**mine, **theirs}
    ]


def distance(first: Tuner, second: Tuner) -> float | None:
    """Norm of the difference of the networks' weights over the norm of the first's; None where their shapes differ.

    Where the first is zero, the norm itself.
    """
    mine, theirs = first.network.state_dict(), second.network.state_dict()
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in theirs.items()}:
        return None
    apart = sum((mine[name].double() - theirs[name].double()).square().sum().item() for name in mine)
    size = sum(value.double().square().sum().item() for value in mine.values())
    return (apart / size if size else apart) ** 0.5


def _largest(first: Tuner, second: Tuner, mapping: Mapping[str, str], most: int) -> list[dict[str, object]]:
    mine, theirs = _sigma(first), _sigma(second)
    tiny = torch.finfo(torch.float32).tiny
    rows: list[tuple[float, dict[str, object]]] = []
    for name, source in mapping.items():
        ratio = max(theirs[name], tiny) / max(mine[source], tiny)
        row = {"block": name, "first": mine[source], "second": theirs[name], "ratio": ratio}
        rows.append((max(ratio, 1 / ratio), row))
    return [row for size, row in sorted(rows, key=lambda found: -found[0]) if size > 1][:most]


def _sigma(tuner: Tuner) -> dict[str, float]:
    values = typical_sigma(tuner).reshape(len(tuner.fingerprint.names), -1)[:, 0].tolist()
    return dict(zip(tuner.fingerprint.names, values, strict=True))
