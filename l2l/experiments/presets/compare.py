"""``l2l compare``: methods x models x tasks x schemes x seeds at equal budgets and equal tuning effort, on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from l2l.experiments import stats, tables
from l2l.experiments.runner import Chosen, Executor, Runner, check_all, check_folder, executor_of, experiment_folder
from l2l.experiments.spec import CompareConfig, MethodCosts, Place
from l2l.experiments.stats import Cell, Run, RunTable
from l2l.experiments.tables import draw_all
from l2l.report.run_directory import RunDirectory, write_whole

MARKDOWN, PAGE = "compare.md", "index.html"


def run_comparison(config: CompareConfig) -> dict[str, Any]:
    """Run a comparison; what ``summary.json`` holds. Bad input: ValueError or FileNotFoundError before anything is written."""
    torch.set_num_threads(1)  # the runs share the processors
    check_folder(config, again=True)  # before models and rows are read, which check the rest
    executor = executor_of(config.executor, config.processes, config.ray_address)
    checked = check_all(config, config.contenders)
    with experiment_folder(config, checked, again=True) as (folder, runs):  # what is new may be added to a finished one
        return _compare(config, executor, checked, folder, runs)


def _compare(
    config: CompareConfig, executor: Executor, checked: Sequence[Place], folder: RunDirectory, runs: Path
) -> dict[str, Any]:
    path = folder.path
    places = [place.frozen(runs / "_tuners") for place in checked]
    left_out = [
        f"left out of {place.setting.name}, {place.scheme.name}: {label}: {reason}"
        for place in places
        for label, reason in place.left_out.items()
    ]
    print("".join(f"{line}\n" for line in left_out), end="")
    runner = Runner(config, executor, places, runs, refuse=True)
    results = runner.tune()
    chosen = runner.choose(results)
    results += runner.table({at: point for at, (point, _) in chosen.items()})
    costs = {label: entry.costs for place in reversed(places) for label, entry in place.entries.items()}
    cells = [cell for place in places for cell in place.cells]
    labels = list(dict.fromkeys(label for place in places for label in (*place.entries, *place.left_out)))
    table = RunTable.of(results, cells, labels)
    main = [
        *tables.standings(table, config.baseline),
        *tables.figures(table, "train_loss", "final training loss (nats)", lowest=True),
        *tables.figures(table, "accuracy", "test accuracy (token F1 where the task generates)", lowest=False),
    ]
    every = [*main, tables.step_sizes(table, chosen), tables.memory(table, costs)]
    passes = " or ".join(map(str, dict.fromkeys(setting.passes or config.passes for setting in config.settings)))
    spent = f"{passes} forward passes" if config.seconds is None else f"{config.seconds:g} seconds of training"
    title = f"{len(labels)} methods at {spent}"
    paragraphs = [*sentences(config, cells, results, chosen, costs), *left_out]
    tables.write_records(path, [record(run) for run in results])
    write_whole(path / MARKDOWN, lambda target: target.write_text(tables.markdown(title, paragraphs, every)))
    tables.write_page(path / PAGE, title, paragraphs, every, draw_all(path, table), config.recorded)
    everywhere, losses = table.everywhere, table.losses if table.everywhere else None
    tuning = [run for run in results if run.tuning]
    summary = {
        "methods": {label: asdict(costs[label]) for label in labels if label in costs},
        "cells": [cell._asdict() for cell in cells],
        "average_rank": stats.ranks_by_label(table),
        "average_rank_by_place": {name: stats.ranks_by_label(part) for name, part in table.places.items()},
        "rank_intervals": {} if losses is None else dict(zip(everywhere, map(list, stats.rank_intervals(losses)), strict=True)),
        "wins": {"methods": everywhere, "row_beats_column": [] if losses is None else stats.wins(losses).tolist()},
        "chosen": [
            {**cell._asdict(), "method": label, **point, "at_edge": stats.at_edge(point, grid)}
            for (cell, label), (point, grid) in chosen.items()
        ],
        "diverged": sum(run.diverged for run in results) - sum(run.diverged for run in tuning),
        "diverged_while_tuning": sum(run.diverged for run in tuning),
        "refused": sum(bool(run.refused) for run in results),
        "left_out": left_out,
        "runs": len(results),
        "config": asdict(config),
    }
    folder.finish(tables.finite(summary))
    tables.print_tables(main)
    print(f"page: {path / PAGE}")
    return summary


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
    normalized = {label for label, cost in costs.items() if cost.step_is_normalized}
    unscaled = [one.label for one in config.contenders if one.scale == 1 and not one.grid and one.label in normalized]
    if unscaled:
        found.append(
            f"{', '.join(unscaled)}: steps of a length of their own, and neither a scale nor a grid: the shared learning rates "
            "are of another magnitude than theirs, so these runs say little about them."
        )
    refused = {(run.contender, *run.cell, run.refused) for run in results if run.refused}
    return found + [f"refused: {' '.join(words)}" for words in sorted(refused)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
