"""``l2l tuners diff A B``: what two tuners have in common and where they part.

Whether a tuner may be trusted with a model: its files, its blocks, its sigma, its card, each with a finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from l2l.tuners import io as store
from l2l.tuners.diagnostics import movement, sigma_by_kind, typical_history, typical_sigma
from l2l.tuners.features import RunStatistics, block_constants
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.io import SHA256, to_config
from l2l.tuners.model import Tuner
from l2l.tuners.transfer import Level, check_level, classify

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
    """Compare two tuners. Sigma is taken at ordinary weights and losses, see :mod:`l2l.tuners.diagnostics`."""
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


LOSSES = (0.0, 0.7, 2.0, 5.0, 11.0)
"""At which sigma is looked at: from a solved task to the guesses of a fresh model over a large vocabulary."""
WIDEST = 20.0
"""Sigma after normalisation above which a block is named: MeZO's is 1, and no published tuner reaches 10."""
BARELY = 0.01
"""Movement of the median block, relative, below which a tuner is mostly what it began as."""
SECTIONS = ("## Recipe", "## Results")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what came of it."""

    level: Literal["ok", "warning", "error"]
    what: str
    text: str


def verify(
    name: str | Path, prints: Fingerprint | None = None, revision: str | None = None, match: Level = "exact"
) -> list[Finding]:
    """Findings on a tuner, errors included; only a name that is nowhere raises.

    Args:
        name: directory, bundled name or hub id.
        prints: blocks of the model that it shall serve; None: they are not compared.
        match: how alike that model must be to the tuner's own.

    Raises:
        FileNotFoundError: there is no such tuner.
        ValueError: there is no such level of likeness.
    """
    check_level(match)
    directory = store.locate(str(name), revision)
    try:
        tuner = store.load(directory)
    except ValueError as error:
        return [Finding("error", "files", str(error))]
    found = [Finding("ok", "files", f"{len(tuner.fingerprint.names)} blocks, names, shapes and numbers are whole")]
    found += [_checksum(directory), _blocks(tuner, prints, match), *_check_sigma(tuner), _learned(tuner)]
    return found + _card(directory, tuner)


def refuse_errors(name: str | Path, findings: Sequence[Finding]) -> None:
    """Raise ValueError, naming the first, if there are errors among the findings."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise ValueError(f"tuner {str(name)!r} fails on {errors[0].what}{more}: {errors[0].text}")


def _checksum(directory: Path) -> Finding:
    if SHA256 in store.read_config(directory / store.CONFIG):
        return Finding("ok", "checksum", "the weights are those that were saved")
    return Finding("warning", "checksum", "the config has none: damage that leaves finite numbers would not be seen")


def _blocks(tuner: Tuner, prints: Fingerprint | None, match: Level) -> Finding:
    base = tuner.provenance.base_model
    if tuner.size_free:
        return Finding("ok", "blocks", "it belongs to no blocks and serves any model")
    if prints is None:
        return Finding("warning", "blocks", f"not compared with a model: name one, as --model {base}")
    found = classify(tuner.fingerprint, prints)
    if not found.accepted(match):
        text = f"made for {base!r}, does not fit the model ({found.kind}): {found.message}; --match {found.needed} allows it"
        return Finding("error", "blocks", text)
    if found.kind == "exact":
        return Finding("ok", "blocks", f"exact: all {len(prints.names)} are the model's, {found.message}")
    return Finding("warning", "blocks", f"{found.kind}: {found.message}")


def _check_sigma(tuner: Tuner) -> list[Finding]:
    """Sigma, before and after normalisation, at losses from the least to the largest that are met."""
    names, blocks = tuner.fingerprint.names, tuner.fingerprint.blocks()
    start = typical_history(tuner)
    moments, constants = start.moments, block_constants(blocks, start.moments)
    largest, least = torch.zeros(len(names)), torch.full((len(names),), torch.inf)
    for loss in LOSSES:
        with torch.no_grad():
            scales = tuner.scales(tuner.features(RunStatistics(start.sigma, moments, loss, loss, constants)), names)
        if not torch.isfinite(scales).all() or (scales < 0).any():
            return [
                Finding("error", "sigma", f"at a loss of {loss:g} it is not finite or negative: the tuner is broken")
            ]
        try:
            scales = scales * tuner.factor(scales, blocks)
        except ValueError as error:
            return [Finding("error", "sigma", f"at a loss of {loss:g}: {error}")]
        rows = scales.reshape(len(names), -1)
        largest, least = torch.maximum(largest, rows.amax(1)), torch.minimum(least, rows[:, 0])
    return [_range(names, least, largest)]


def _range(names: Sequence[str], least: Tensor, largest: Tensor) -> Finding:
    span = f"{least.min():.3g} to {largest.max():.3g} after normalisation, at losses of {LOSSES[0]:g} to {LOSSES[-1]:g}"
    wide = [name for name, value in zip(names, largest.tolist(), strict=True) if value > WIDEST]
    if wide:
        return Finding("warning", "sigma", f"{span}: above {WIDEST:g} in {len(wide)} blocks, {format_names(wide)}")
    still = [name for name, value in zip(names, largest.tolist(), strict=True) if value == 0]
    if still:
        return Finding("warning", "sigma", f"{span}: 0, so never moved, in {len(still)} blocks, {format_names(still)}")
    return Finding("ok", "sigma", span)


def _learned(tuner: Tuner) -> Finding:
    moved = movement(tuner)
    if not moved:
        return Finding("warning", "learning", "what it started from is not known, nor is what was learned")
    text = f"moved from its initialisation by {median(moved):.2g} (median block) to {max(moved):.2g} of its norm"
    if max(moved) == 0:
        return Finding("warning", "learning", "it is as it was initialised: nothing was learned")
    if median(moved) < BARELY:
        return Finding("warning", "learning", f"{text}: most of it still is its random start")
    return Finding("ok", "learning", text)


def _card(directory: Path, tuner: Tuner) -> list[Finding]:
    path, base = directory / store.CARD, tuner.provenance.base_model
    if not path.is_file():
        return [Finding("error", "card", f"{path} is not there: save the tuner again")]
    text = path.read_text(errors="replace")
    missing = [part for part in (f"base_model: {base}\n", *SECTIONS) if part not in text]
    if missing:
        return [
            Finding("error", "card", f"{path} lacks {', '.join(repr(part.strip()) for part in missing)}: save it again")
        ]
    known = tuner.provenance
    licence = str(known.recipe.get("licence", UNKNOWN))
    wants = {"what it reached (results)": known.results, "how it was made (recipe)": known.recipe}
    wants |= {"its base model": base != UNKNOWN, "its licence": not licence.startswith(UNKNOWN)}
    absent = [what for what, value in wants.items() if not value]
    if absent:
        return [Finding("warning", "card", f"it does not say {', '.join(absent)}")]
    return [Finding("ok", "card", "recipe, results, base model and licence are stated")]
