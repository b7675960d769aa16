"""``l2l compare``: methods x models x tasks x schemes x seeds at equal passes and equal tuning effort, to one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from l2l.experiments.results import Outcome, write_results
from l2l.experiments.runner import (
    Cell,
    Executor,
    Place,
    Result,
    Trial,
    executor_of,
    is_done,
    record,
    result_of,
    run_cell,
    trial_of,
)
from l2l.experiments.spec import HOW, CompareConfig, points
from l2l.experiments.stats import Point, choose, point_size
from l2l.experiments.validation import Checked, check_all
from l2l.report.console import progress_bar
from l2l.report.run_directory import CONFIG, SUMMARY, RunDirectory

Chosen = dict[tuple[Cell, str], tuple[Point, Sequence[float]]]
"""(cell, method) -> the step size chosen, and the grid that it was chosen from."""


def run_comparison(config: CompareConfig) -> dict[str, Any]:
    """Run what is missing of the comparison, and write what it comes to; what ``summary.json`` holds.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    torch.set_num_threads(1)  # the runs share the processors
    executor = executor_of(config.executor, config.processes)
    checked = check_all(config)
    folder = opened(config)
    runs = Path(config.runs) if config.runs else folder.path / "runs"
    places = [found.place(runs / "_tuners") for found in checked]
    for line in left_out(places):
        print(line)
    tuning = [trial for place in places for trial in _tuning(config, place, runs)]
    results = _run(config, executor, tuning, "step sizes")
    chosen = _chosen(config, places, results)
    table = [trial for place in places for trial in _table(config, place, chosen, runs)]
    results += _run(config, executor, table, "table")
    return write_results(folder, _outcome(config, checked, places, results, chosen))


def opened(config: CompareConfig) -> RunDirectory:
    """The directory of the comparison: new, interrupted, or finished by the same configuration, to which may be added.

    Raises:
        ValueError: it holds something else.
    """
    what = plain(config)
    path = Path(config.out)
    if not config.overwrite and (path / CONFIG).is_file() and yaml.safe_load((path / CONFIG).read_text()) == what:
        (path / SUMMARY).unlink(missing_ok=True)
    return RunDirectory(path, what, config.overwrite).create()


def plain(config: CompareConfig) -> dict[str, Any]:
    """The configuration as YAML has it, without what only says how it is run."""
    what = {name: value for name, value in asdict(config).items() if name not in HOW}
    return yaml.safe_load(yaml.safe_dump(what))


def left_out(places: Sequence[Place]) -> list[str]:
    """A line for each method that does not take part somewhere."""
    return [
        f"left out of {place.setting.name}, {place.scheme.name}: {label}: {reason}"
        for place in places
        for label, reason in place.left_out.items()
    ]


def _tuning(config: CompareConfig, place: Place, runs: Path) -> list[Trial]:
    """The whole grid on the tuning seed, for all who have a choice."""
    found = []
    for task, label in product(place.setting.tasks, place.entries):
        options = points(config, place.setting, place.scheme, place.entries[label][0])
        for point in options if len(options) > 1 else ():
            found.append(trial_of(config, place, label, task, point, config.tuning_seed, True, runs))
    return found


def _chosen(config: CompareConfig, places: Sequence[Place], results: Sequence[Result]) -> Chosen:
    """The step size of lowest dev loss; of one that did not run, the first."""
    tried: dict[tuple[Cell, str], list[Result]] = {}
    for result in results:
        tried.setdefault((result.cell, result.label), []).append(result)
    found: Chosen = {}
    for place in places:
        for cell, (label, (given, _)) in product(place.cells, place.entries.items()):
            options = points(config, place.setting, place.scheme, given)
            point = choose([result.run for result in tried[cell, label]]) if len(options) > 1 else options[0]
            found[cell, label] = point, [point_size(option) for option in options]
    return found


def _table(config: CompareConfig, place: Place, chosen: Chosen, runs: Path) -> list[Trial]:
    """Every cell and method at the step size chosen, over the seeds."""
    return [
        trial_of(config, place, label, cell.task, chosen[cell, label][0], seed, False, runs)
        for seed, cell, label in product(range(config.seeds), place.cells, place.entries)
    ]


def _run(config: CompareConfig, executor: Executor, trials: Sequence[Trial], what: str) -> list[Result]:
    """Run what is not done yet. Trials that come to the same run share it."""
    jobs = {trial.job.out: trial.job for trial in trials}
    missing = [job for job in jobs.values() if not is_done(job)]
    if jobs and len(missing) < len(jobs):
        print(f"continuing: {len(jobs) - len(missing)} of {len(jobs)} runs for the {what} are done")
    refused: Mapping[str, str] = {}
    if missing:
        with progress_bar(what, len(jobs), len(jobs) - len(missing), config.progress) as advance:
            records = executor.run(missing, run_cell, lambda record: advance(record["final_loss"]))
        pairs = zip(missing, records, strict=True)
        refused = {job.out: record["refused"] for job, record in pairs if "refused" in record}
    return [result_of(trial, refused) for trial in trials]


def _outcome(
    config: CompareConfig,
    checked: Sequence[Checked],
    places: Sequence[Place],
    results: Sequence[Result],
    chosen: Chosen,
) -> Outcome:
    labels = list(dict.fromkeys(label for place in places for label in (*place.entries, *place.left_out)))
    by_place = {(place.setting.name, place.scheme.name): place for place in places}
    records = [record(result, by_place[result.cell.setting, result.cell.scheme]) for result in results]
    facts: dict[str, Any] = {}
    for place in checked:
        facts = {**place.facts, **facts}
    cells = [cell for place in places for cell in place.cells]
    return Outcome(config, cells, labels, results, records, chosen, facts, left_out(places))
