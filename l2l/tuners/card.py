"""The card of a tuner: what it is, how it was made, what it reached. Written from the tuner and its config alone."""

from __future__ import annotations

import json
import re
from statistics import median
from typing import Any

from l2l.tuners.anatomy import (
    TYPICAL_LOSS,
    TYPICAL_VARIANCE,
    basis_line,
    movement,
    sigma_by_kind,
    sigma_change,
    turns_line,
)
from l2l.tuners.results import EVALUATION, TESTS, sections
from l2l.tuners.tuner import Tuner

__all__ = ["movement", "render"]

LICENCE = re.compile(r"[\w.+-]+")
VALUES_SHOWN = 5
"""Blocks named, and the longest list that is written out."""


def render(tuner: Tuner, config: dict[str, Any]) -> str:
    """The card as Markdown, with the metadata header that the hub reads."""
    base = config["base_model"]
    sections = [
        _header(base, config["recipe"].get("licence")),
        f"Sets the perturbation scale (sigma) of each of the {len(tuner.fingerprint.names)} blocks of `{base}` in "
        f"zeroth-order fine-tuning.{_reach(tuner)}",
        _example(base),
        f"Architecture `{config['architecture']}` {_brief(config['architecture_args'])}, features "
        f"`{config['features']}`, normaliser {_brief(config['normaliser'])}. Basis: {basis_line(tuner)}. "
        f"Turns: {turns_line(tuner)}.",
        *_state(tuner),
        "## Recipe",
        _json(config["recipe"]),
        "## Results",
        *_results(config["results"]),
        f"Made with {', '.join(f'{name} {number}' for name, number in config['versions'].items())}.",
    ]
    return "\n\n".join(sections) + "\n"


def _results(results: dict[str, Any]) -> list[str]:
    """Tables of what was found since, then what its own training found."""
    tables = sections(results)
    if not results:
        return ["None are recorded."]
    own = {name: value for name, value in results.items() if not tables or name not in (EVALUATION, TESTS)}
    return [
        *tables,
        *(["In its own training:"] if tables and own else []),
        *([_json(own)] if own or not tables else []),
    ]


def _header(base: str, licence: object) -> str:
    metadata = ["library_name: l2l", f"base_model: {base}", "tags: [zeroth-order, learned-optimizer, l2l]"]
    if isinstance(licence, str) and LICENCE.fullmatch(licence):  # the hub takes names, no sentences
        metadata.append(f"license: {licence.lower()}")
    return "\n".join(["---", *metadata, "---", f"# Tuner for {base}"])


def _example(base: str) -> str:
    lines = [
        "```python",
        "import l2l",
        "",
        f'model = l2l.load_model("{base}")',
        'tuner = l2l.Tuner.from_pretrained("this directory or its hub id")',
        "optimizer = l2l.ZOFineTuner(model, tuner)",
        "```",
    ]
    return "\n".join(lines)


def _reach(tuner: Tuner) -> str:
    return " Nothing in it belongs to a block: it serves models of other sizes and families." if tuner.size_free else ""


def _state(tuner: Tuner) -> list[str]:
    """How far it moved, and its sigma."""
    moved, changes = movement(tuner), sigma_change(tuner)
    head = "| kind | blocks | min | median | max | CV |\n|---|--:|--:|--:|--:|--:|"
    kinds = "" if tuner.fingerprint.kinds else " (kinds by shape alone: embeddings count as matrices)"
    rows = [
        f"| {row.kind} | {row.blocks} | {row.smallest:.4g} | {row.median:.4g} | {row.largest:.4g} | {row.variation:.3f} |"
        for row in sigma_by_kind(tuner)
    ]
    return [
        f"Distance from its initialisation, relative: {_spread(moved, tuner, '.4f')}.",
        f"Change of sigma since, relative: {_spread(changes, tuner, '+.4f')}.",
        f"Sigma before normalisation, at weights of mean 0 and variance {TYPICAL_VARIANCE:g}, losses of "
        f"{TYPICAL_LOSS:g} and a last sigma of 1{kinds}:",
        "\n".join([head, *rows]),
    ]


def _spread(values: list[float], tuner: Tuner, form: str) -> str:
    if not values:
        return "unknown"
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:VALUES_SHOWN]
    largest = ", ".join(f"`{tuner.fingerprint.names[i]}` {values[i]:{form}}" for i in order)
    return f"median {median(values):{form}}, largest {largest}"


def _brief(values: dict[str, Any]) -> str:
    """JSON in one line; of long lists and tables, how many entries they have."""
    long = {name: value for name, value in values.items() if isinstance(value, list | dict) and len(value) > VALUES_SHOWN}
    return json.dumps(values | {name: f"{len(value)} values" for name, value in long.items()})


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=1)}\n```"
