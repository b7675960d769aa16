"""Whether a tuner may be trusted with a model: its files, its blocks, its sigma, its card, each with a finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from l2l.tuners import store
from l2l.tuners.anatomy import movement, typical_history
from l2l.tuners.constants import block_constants
from l2l.tuners.features import RunStatistics
from l2l.tuners.fingerprint import Fingerprint, format_names
from l2l.tuners.guard import SHA256
from l2l.tuners.match import Level, check_level, classify
from l2l.tuners.tuner import Tuner

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
