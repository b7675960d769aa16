"""``l2l compare``: methods x models x tasks x schemes x seeds at equal budgets and equal tuning effort, on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from l2l.experiments import stats, tables
from l2l.experiments.plots import draw_all
from l2l.experiments.runner import Chosen, Runner, executor_of
from l2l.experiments.spec import CompareConfig, MethodCosts, Place
from l2l.experiments.stats import Cell, Run, RunTable
from l2l.experiments.validation import check_all, freeze_tuners
from l2l.report.files import write_whole
from l2l.report.run_directory import CONFIG, SUMMARY, RunDirectory

MARKDOWN, PAGE = "compare.md", "index.html"


def run_comparison(config: CompareConfig) -> dict[str, Any]:
    """Run the missing runs of a comparison and write its results; returns what ``summary.json`` holds.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    torch.set_num_threads(1)  # the runs share the processors
    executor = executor_of(config.executor, config.processes)
    checked = check_all(config, config.contenders)
    folder = open_directory(config)
    runs = Path(config.runs) if config.runs else folder.path / "runs"
    places = [freeze_tuners(place, runs / "_tuners") for place in checked]
    for line in left_out(places):
        print(line)
    runner = Runner(config, executor, places, runs, refuse=True)
    results = runner.tune()
    chosen = runner.choose(results)
    results += runner.table({at: point for at, (point, _) in chosen.items()})
    return write_results(folder, config, places, results, chosen)


def open_directory(config: CompareConfig) -> RunDirectory:
    """The directory of the comparison: new, interrupted, or finished by the same configuration, to which may be added.

    Raises:
        ValueError: it holds something else.
    """
    path = Path(config.out)
    earlier = path / CONFIG
    if not config.overwrite and earlier.is_file() and yaml.safe_load(earlier.read_text()) == config.recorded:
        (path / SUMMARY).unlink(missing_ok=True)
    return RunDirectory(path, config.recorded, config.overwrite).create()


def left_out(places: Sequence[Place]) -> list[str]:
    """A line for each method that does not take part somewhere."""
    return [
        f"left out of {place.setting.name}, {place.scheme.name}: {label}: {reason}"
        for place in places
        for label, reason in place.left_out.items()
    ]


def write_results(
    folder: RunDirectory, config: CompareConfig, places: Sequence[Place], results: Sequence[Run], chosen: Chosen
) -> dict[str, Any]:
    """Write tables, figures and the page, print the tables; the content of ``summary.json``, which is written last."""
    costs = {label: entry.costs for place in reversed(places) for label, entry in place.entries.items()}
    cells = [cell for place in places for cell in place.cells]
    labels = list(dict.fromkeys(label for place in places for label in (*place.entries, *place.left_out)))
    runs = RunTable.of(results, cells, labels)
    main = [
        *tables.standings(runs, config.baseline),
        *tables.figures(runs, "train_loss", "final training loss (nats)", lowest=True),
        *tables.figures(runs, "accuracy", "test accuracy (token F1 where the task generates)", lowest=False),
    ]
    every = [*main, tables.step_sizes(runs, chosen), tables.memory(runs, costs)]
    title = f"{len(labels)} methods at {budget(config)}"
    paragraphs = [*sentences(config, cells, results, chosen, costs), *left_out(places)]
    path = folder.path
    tables.write_records(path, [record(run) for run in results])
    write_whole(path / MARKDOWN, lambda target: target.write_text(tables.markdown(title, paragraphs, every)))
    tables.write_page(path / PAGE, title, paragraphs, every, draw_all(path, runs), config.recorded)
    everywhere, losses = runs.everywhere, runs.losses if runs.everywhere else None
    tuning = [run for run in results if run.tuning]
    summary = {
        "methods": {label: asdict(costs[label]) for label in labels if label in costs},
        "cells": [cell._asdict() for cell in cells],
        "average_rank": _ranks(runs),
        "average_rank_by_place": {name: _ranks(part) for name, part in runs.places.items()},
        "rank_intervals": {} if losses is None else dict(zip(everywhere, map(list, stats.rank_intervals(losses)), strict=True)),
        "wins": {"methods": everywhere, "row_beats_column": [] if losses is None else stats.wins(losses).tolist()},
        "chosen": [
            {**cell._asdict(), "method": label, **point, "at_edge": stats.at_edge(point, grid)}
            for (cell, label), (point, grid) in chosen.items()
        ],
        "diverged": sum(run.diverged for run in results) - sum(run.diverged for run in tuning),
        "diverged_while_tuning": sum(run.diverged for run in tuning),
        "refused": sum(bool(run.refused) for run in results),
        "left_out": left_out(places),
        "runs": len(results),
        "config": asdict(config),
    }
    folder.finish(tables.finite(summary))
    tables.print_tables(main)
    print(f"page: {path / PAGE}")
    return summary


def _ranks(runs: RunTable) -> dict[str, float]:
    return dict(zip(runs.everywhere, stats.average_ranks(runs.losses), strict=True)) if runs.everywhere else {}


def record(run: Run) -> dict[str, Any]:
    """A run as a row of ``results.csv``: plain values, None where there is none."""
    auto = run.point["lr"] == "auto"
    measured = ("passes", "steps", "seconds", "initial_loss", "train_loss", "dev_loss", "test_loss", "accuracy")
    return {
        "setting": run.cell.setting,
        "model": run.model,
        "scheme": run.cell.scheme,
        "task": run.cell.task,
        "label": run.contender,
        **{name: getattr(run, name) for name in ("method", "tuner", "seed", "tuning")},
        "lr": None if auto else float(run.point["lr"]),
        "step_fraction": float(run.point["step_fraction"]) if auto else None,
        "step_size": stats.point_size(run.point),
        "status": run.status,
        **{name: getattr(run, name) if run.status == "ok" else None for name in (*measured, "best_dev_loss", "best_accuracy")},
        "peak_bytes": run.peak_bytes,
        "reason": run.refused,
        "folder": run.folder,
    }


def budget(config: CompareConfig) -> str:
    """The budget of the runs in words."""
    if config.seconds is not None:
        return f"{config.seconds:g} seconds of training"
    passes = dict.fromkeys(setting.passes or config.passes for setting in config.settings)
    return " or ".join(map(str, passes)) + " forward passes"


def sentences(
    config: CompareConfig, cells: Sequence[Cell], results: Sequence[Run], chosen: Chosen, costs: Mapping[str, MethodCosts]
) -> list[str]:
    """What is compared and how, and the limits of the comparison."""
    grid = max(len(values) for _, values in chosen.values())
    spent = (
        "Every run ends with the first step after which its seconds of training are spent."
        if config.seconds is not None
        else "Every run ends with the first step after which its forward passes have reached the budget, searches and probes "
        "included; a backward pass counts as two."
    )
    found = [
        f"{_count(len(cells), 'cell')} (model, scheme, task), {_count(config.seeds, 'seed')}. {spent} Each method chose among "
        f"{_count(grid, 'step size')} per cell by dev loss, on seed {config.tuning_seed}, which is in no table. Losses and "
        "accuracy are those of the last step's weights; mean ± standard deviation over the seeds. Seconds are those of "
        "training, with as many runs side by side as there were processes."
    ]
    if grid == 1:
        found.append("Nothing was tuned: there was one step size per method.")
    if config.seeds < stats.SEEDS:
        found.append(f"With {config.seeds} of {stats.SEEDS} seeds, differences of this table may be chance.")
    unscaled = [
        one.label
        for one in config.contenders
        if one.scale == 1 and not one.grid and costs.get(one.label, MethodCosts()).step_is_normalized
    ]
    if unscaled:
        found.append(
            f"{', '.join(unscaled)}: steps of a length of their own, and neither a scale nor a grid: the shared learning rates "
            "are of another magnitude than theirs, so these runs say little about them."
        )
    refused = {(run.contender, *run.cell, run.refused) for run in results if run.refused}
    return found + [f"refused: {' '.join(words)}" for words in sorted(refused)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
