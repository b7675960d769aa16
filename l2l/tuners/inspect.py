"""``l2l tuners verify``: whether a tuner may be used with a model; ``l2l tuners diff``: how two tuners differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

import torch

from l2l.tuners import io, sources
from l2l.tuners.card import UNKNOWN
from l2l.tuners.diagnostics import dense_sigma, movement, sigma_by_kind, typical_statistics
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.io import CARD, CONFIG, SHA256, read_config
from l2l.tuners.model import TunerModel
from l2l.tuners.transfer import Level, check_level, classify

MOST = 5
"""Blocks that a comparison names."""
NOT_COMPARED = ("blocks", "format", "fingerprint")
"""Fields of the config that are compared in other ways."""
LOSSES = (0.0, 0.7, 2.0, 5.0, 11.0)
"""At which sigma is checked: from a solved task to the guesses of a fresh model over a large vocabulary."""
WIDEST = 20.0
"""Sigma after normalisation above which a block is named: MeZO's is 1, and no published tuner reaches 10."""
BARELY = 0.01
"""Movement of the median block, relative, below which a tuner is mostly its random initialisation."""
SECTIONS = ("## Recipe", "## Results")


Grade: TypeAlias = Literal["ok", "warning", "error"]
Verdict: TypeAlias = tuple[Grade, str]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Grade
    what: str
    text: str


def verify(
    name: str | Path, fingerprint: Fingerprint | None = None, revision: str | None = None, match: Level = "exact"
) -> list[Finding]:
    """Findings on a tuner, errors included; FileNotFoundError where there is no such tuner.

    Args:
        name: directory, bundled or registered name, or hub id.
        fingerprint: of the model to use it with; None: the blocks are not compared.
        match: required similarity of that model to the tuner's own.
    """
    check_level(match)
    directory = sources.locate(str(name), revision)
    try:
        tuner = io.load(directory, TunerModel)
    except ValueError as error:
        return [Finding("error", "files", str(error))]
    checksum: Verdict = "ok", "the weights are those that were saved"
    if SHA256 not in read_config(directory / CONFIG):
        checksum = "warning", "the config has none: damage that leaves finite numbers would not be seen"
    verdicts: dict[str, Verdict] = {
        "files": ("ok", f"{len(tuner.fingerprint.names)} blocks, names, shapes and numbers are whole"),
        "checksum": checksum,
        "blocks": _blocks(tuner, fingerprint, match),
        "sigma": _sigma(tuner),
        "learning": _learning(tuner),
        "card": _card(directory / CARD, tuner),
    }
    return [Finding(level, what, text) for what, (level, text) in verdicts.items()]


def refuse_errors(name: str | Path, findings: Sequence[Finding]) -> None:
    """Raise ValueError, naming the first, if there are errors among the findings."""
    if errors := [finding for finding in findings if finding.level == "error"]:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise ValueError(f"tuner {str(name)!r} fails on {errors[0].what}{more}: {errors[0].text}")


def _blocks(tuner: TunerModel, fingerprint: Fingerprint | None, match: Level) -> Verdict:
    base = tuner.provenance.base_model
    if tuner.size_free:
        return "ok", "it belongs to no blocks and serves any model"
    if fingerprint is None:
        return "warning", f"not compared with a model: name one, as --model {base}"
    found = classify(tuner.fingerprint, fingerprint)
    if not found.accepted(match):
        misfit = f"made for {base!r}, does not fit the model ({found.kind})"
        return "error", f"{misfit}: {found.message}; --match {found.needed} allows it"
    if found.kind == "exact":
        return "ok", f"exact: all {len(fingerprint.names)} are the model's, {found.message}"
    return "warning", f"{found.kind}: {found.message}"


def _sigma(tuner: TunerModel) -> Verdict:
    """Sigma, before and after normalisation, over the range of losses."""
    names, blocks = tuner.fingerprint.names, tuner.fingerprint.blocks()
    largest, least = torch.zeros(len(names)), torch.full((len(names),), torch.inf)
    for loss in LOSSES:
        with torch.no_grad():
            scales = tuner.scales(tuner.features(typical_statistics(tuner, loss)), names)
        if not torch.isfinite(scales).all() or (scales < 0).any():
            return "error", f"at a loss of {loss:g} it is not finite or negative: the tuner is broken"
        try:
            scales = scales * tuner.factor(scales, blocks)
        except ValueError as error:
            return "error", f"at a loss of {loss:g}: {error}"
        rows = scales.reshape(len(names), -1)
        largest, least = torch.maximum(largest, rows.amax(1)), torch.minimum(least, rows[:, 0])
    span = f"{least.min():.3g} to {largest.max():.3g} after normalisation, at losses of {LOSSES[0]:g} to {LOSSES[-1]:g}"
    for what, odd in ((f"above {WIDEST:g}", largest > WIDEST), ("0, so never moved,", largest == 0)):
        if found := [name for name, is_odd in zip(names, odd.tolist(), strict=True) if is_odd]:
            return "warning", f"{span}: {what} in {len(found)} blocks, {format_names(found)}"
    return "ok", span


def _learning(tuner: TunerModel) -> Verdict:
    moved = movement(tuner)
    if not moved:
        return "warning", "its initialisation is not known, so neither is what was learned"
    if max(moved) == 0:
        return "warning", "it is as it was initialised: nothing was learned"
    text = f"moved from its initialisation by {median(moved):.2g} (median block) to {max(moved):.2g} of its norm"
    if median(moved) < BARELY:
        return "warning", f"{text}: most of it still is its random start"
    return "ok", text


def _card(path: Path, tuner: TunerModel) -> Verdict:
    known = tuner.provenance
    if not path.is_file():
        return "error", f"{path} is not there: save the tuner again"
    text = path.read_text(errors="replace")
    missing = [part.strip() for part in (f"base_model: {known.base_model}\n", *SECTIONS) if part not in text]
    if missing:
        return "error", f"{path} lacks {', '.join(map(repr, missing))}: save it again"
    stated = {"what it reached (results)": known.results, "how it was made (recipe)": known.recipe}
    stated |= {"its base model": known.base_model != UNKNOWN}
    stated |= {"its licence": not str(known.recipe.get("licence", UNKNOWN)).startswith(UNKNOWN)}
    if absent := [what for what, value in stated.items() if not value]:
        return "warning", f"it does not say {', '.join(absent)}"
    return "ok", "recipe, results, base model and licence are stated"


@dataclass(frozen=True)
class Difference:
    """Changes from the first tuner to the second."""

    blocks: str
    """Relation of the second's blocks to those of the first."""
    config: list[dict[str, str]]
    """Fields that differ: name, first, second."""
    sigma: list[dict[str, Any]]
    """Per kind of block: median and largest typical sigma of both."""
    distance: float | None
    """Of the networks' weights, relative to the first; None where they have other shapes."""
    changes: list[dict[str, Any]]
    """Common blocks whose sigma differs most: name, first, second, ratio."""


def difference(first: TunerModel, second: TunerModel, most: int = MOST) -> Difference:
    """Compare two tuners. Sigma is taken at ordinary weights and losses, see :mod:`l2l.tuners.diagnostics`."""
    match = classify(first.fingerprint, second.fingerprint)
    first, second = _with_kinds(first, second), _with_kinds(second, first)
    mine, theirs = ({row.kind: row for row in sigma_by_kind(tuner)} for tuner in (first, second))
    sigma: list[dict[str, Any]] = [{"kind": kind} for kind in {**mine, **theirs}]
    for row, name, (which, rows) in product(sigma, ("median", "largest"), (("first", mine), ("second", theirs))):
        row[f"{which} {name}"] = getattr(rows[row["kind"]], name) if row["kind"] in rows else "-"
    before, after = (dict(zip(tuner.fingerprint.names, dense_sigma(tuner).tolist(), strict=True)) for tuner in (first, second))
    tiny = torch.finfo(torch.float32).tiny
    changes: list[tuple[float, dict[str, Any]]] = []
    for name, source in match.mapping.items():
        ratio = max(after[name], tiny) / max(before[source], tiny)
        row = {"block": name, "first": before[source], "second": after[name], "ratio": ratio}
        changes.append((max(ratio, 1 / ratio), row))
    largest = [row for size, row in sorted(changes, key=lambda found: -found[0]) if size > 1][:most]
    config = config_changes(io.to_config(first), io.to_config(second))
    return Difference(f"{match.kind}: {match.message}", config, sigma, distance(first, second), largest)


def _with_kinds(tuner: TunerModel, other: TunerModel) -> TunerModel:
    """A tuner that was saved without kinds of blocks, with those of another one for the same blocks."""
    kinds = dict(zip(other.fingerprint.names, other.fingerprint.kinds, strict=False))
    if tuner.fingerprint.kinds or not kinds or tuner.fingerprint.differences(other.fingerprint):
        return tuner
    known = tuple(kinds[name] for name in tuner.fingerprint.names)
    return replace(tuner, fingerprint=replace(tuner.fingerprint, kinds=known))


def config_changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, str]]:
    """Fields of two configs that differ, nested ones by their dotted names, in the order of the first."""
    mine, theirs = (dict(_flat({n: v for n, v in one.items() if n not in NOT_COMPARED})) for one in (first, second))
    names = [name for name in {**mine, **theirs} if mine.get(name, "-") != theirs.get(name, "-")]
    return [{"field": name, "first": mine.get(name, "-"), "second": theirs.get(name, "-")} for name in names]


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, text if len(text := str(value)) <= 60 else f"{text[:57]}..."


def distance(first: TunerModel, second: TunerModel) -> float | None:
    """Norm of the difference of the networks' weights over the norm of the first's; None where their shapes differ.

    Where the first is zero, the norm itself.
    """
    mine, theirs = first.network.state_dict(), second.network.state_dict()
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in theirs.items()}:
        return None
    square = sum((mine[name].double() - theirs[name].double()).square().sum().item() for name in mine)
    size = sum(value.double().square().sum().item() for value in mine.values())
    return (square / size if size else square) ** 0.5
