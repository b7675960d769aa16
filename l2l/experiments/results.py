"""``results.csv`` and ``results.parquet``: a row per run, tuning runs among them.

What a comparison leaves: results.csv and .parquet, compare.md, figures, index.html and summary.json.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from l2l.experiments.plots import draw_all
from l2l.experiments.runner import Cell, Result
from l2l.experiments.spec import HOW, CompareConfig, contenders
from l2l.experiments.stats import SEEDS, Point, at_edge, average_ranks, rank_intervals, wins
from l2l.experiments.tables import Field, Sheet, figures, markdown, memory, page, standings, step_sizes
from l2l.experiments.validation import MethodFacts
from l2l.experiments.verdict import finite
from l2l.report.console import print_table
from l2l.report.files import write_whole
from l2l.report.run_directory import RunDirectory, environment

NAME = "results"


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the records, whole; Parquet only where ``pyarrow`` is installed."""
    written = [write_whole(folder / f"{NAME}.csv", lambda path: _write_csv(path, records))]
    try:
        parquet = import_module("pyarrow.parquet")
        arrow = import_module("pyarrow")
    except ImportError:
        return written
    table = arrow.Table.from_pylist([dict(record) for record in records])
    return [*written, write_whole(folder / f"{NAME}.parquet", lambda path: parquet.write_table(table, path))]


def _write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


PAPER, PAGE = "compare.md", "index.html"


@dataclass(frozen=True)
class Outcome:
    """Everything that a comparison came to."""

    config: CompareConfig
    cells: Sequence[Cell]
    labels: Sequence[str]
    results: Sequence[Result]
    records: Sequence[Mapping[str, Any]]
    chosen: Mapping[tuple[Cell, str], tuple[Point, Sequence[float]]]
    facts: Mapping[str, MethodFacts]
    left_out: Sequence[str]


def write_results(folder: RunDirectory, outcome: Outcome) -> dict[str, Any]:
    """Write everything and print the tables; what ``summary.json`` holds, which is written last."""
    config, path = outcome.config, folder.path
    field = Field.of(outcome.results, outcome.cells, outcome.labels)
    sheets = sheets_of(field, outcome)
    title = f"{len(outcome.labels)} methods at {_passes(config)} forward passes"
    said = sentences(field, outcome)
    write_records(path, outcome.records)
    write_whole(path / PAPER, lambda target: target.write_text(markdown(title, said, sheets)))
    pictures = draw_all(path, field)
    kept = {name: value for name, value in asdict(config).items() if name not in HOW}
    listings = {name: yaml.safe_dump(value, sort_keys=False) for name, value in _listings(kept).items()}
    html = page(title, said, sheets, pictures, listings)
    write_whole(path / PAGE, lambda target: target.write_text(html))
    summary = summary_of(field, outcome)
    folder.finish(finite(summary))
    _print(sheets, path)
    return summary


def _listings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"Configuration": dict(config), "Versions and hardware": environment()}


def _passes(config: CompareConfig) -> str:
    return " or ".join(str(passes) for passes in dict.fromkeys(s.passes or config.passes for s in config.settings))


def sheets_of(field: Field, outcome: Outcome) -> list[Sheet]:
    """All tables, the one over all cells first."""
    return [
        *standings(field, outcome.config.baseline),
        *figures(field, "train_loss", "final training loss (nats)", lowest=True),
        *figures(field, "accuracy", "test accuracy (token F1 where the task generates)", lowest=False),
        step_sizes(field, outcome.chosen),
        memory(field, outcome.facts),
    ]


def sentences(field: Field, outcome: Outcome) -> list[str]:
    """What is compared, and where the comparison is less than it could be."""
    config, found = outcome.config, []
    grid = max(len(values) for _, values in outcome.chosen.values())
    found.append(
        f"{_count(len(outcome.cells), 'cell')} (model, scheme, task), {_count(config.seeds, 'seed')}. Every run ends with "
        "the first step after which its forward passes have reached the budget, searches and probes included; a backward "
        f"pass counts as two. Each method chose among {_count(grid, 'step size')} per cell by dev loss, on seed "
        f"{config.tuning_seed}, which is in no table. Losses and accuracy are those of the last step's weights; mean ± "
        "standard deviation over the seeds. Seconds are those of training, with as many runs side by side as there were "
        "processes."
    )
    if grid == 1:
        found.append("Nothing was tuned: there was one step size per method.")
    if config.seeds < SEEDS:
        found.append(f"With {config.seeds} of {SEEDS} seeds, differences of this table may be chance.")
    found += _ill_suited(outcome)
    refused = {(result.label, *result.cell, result.refused) for result in outcome.results if result.refused}
    found += [f"refused: {' '.join(words)}" for words in sorted(refused)]
    return [*found, *outcome.left_out]


def _ill_suited(outcome: Outcome) -> list[str]:
    """Who runs at learning rates that were meant for steps of another size."""
    labels = [
        entry.label
        for entry in contenders(outcome.config)
        if entry.scale == 1 and not entry.grid and outcome.facts.get(entry.label, MethodFacts()).step_is_normalized
    ]
    if not labels:
        return []
    return [
        f"{', '.join(labels)}: steps of a length of their own, and neither a scale nor a grid: the shared learning rates are "
        "of another size than theirs, so these runs say little about them."
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def summary_of(field: Field, outcome: Outcome) -> dict[str, Any]:
    """The summary; the environment is added where it is written."""
    everywhere = field.everywhere
    intervals = rank_intervals(field.losses) if everywhere else []
    return {
        "methods": {label: asdict(outcome.facts[label]) for label in outcome.labels if label in outcome.facts},
        "cells": [cell._asdict() for cell in outcome.cells],
        "average_rank": _ranks(field),
        "average_rank_by_place": {name: _ranks(part) for name, part in field.places.items()},
        "rank_intervals": dict(zip(everywhere, [list(ends) for ends in intervals], strict=True)),
        "wins": {"methods": everywhere, "row_beats_column": wins(field.losses).tolist() if everywhere else []},
        "chosen": [
            {**cell._asdict(), "method": label, **point, "at_edge": at_edge(point, grid)}
            for (cell, label), (point, grid) in outcome.chosen.items()
        ],
        "diverged": sum(result.run.diverged for result in outcome.results if not result.run.tuning),
        "diverged_while_tuning": sum(result.run.diverged for result in outcome.results if result.run.tuning),
        "refused": sum(bool(result.refused) for result in outcome.results),
        "left_out": list(outcome.left_out),
        "runs": len(outcome.results),
        "config": asdict(outcome.config),
    }


def _ranks(field: Field) -> dict[str, float]:
    return dict(zip(field.everywhere, average_ranks(field.losses) if field.everywhere else [], strict=True))


def _print(sheets: Sequence[Sheet], path: Path) -> None:
    """The tables of ranks, losses and accuracy; the others are on the page."""
    for sheet in sheets[:-2]:
        rows = [dict(zip(sheet.columns, (text.text for text in row), strict=True)) for row in sheet.rows]
        print_table(sheet.title, rows)
    print(f"page: {path / PAGE}")
