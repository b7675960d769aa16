"""``l2l meta-evaluate``: judge tuners by the frozen protocol, docs/protocol.md, from a configuration to a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from l2l.experiments.console import draw, print_tables
from l2l.experiments.controls import Controls, build_controls
from l2l.experiments.runner import Trial, is_done, outcome, run_jobs, run_tolerantly, trial
from l2l.experiments.spec import BASELINE_DIZO, CONTROLS, Entry, MetaEvaluateConfig, freeze
from l2l.experiments.stats import SEEDS, Point, Run, at_edge, choose, point_size
from l2l.experiments.validation import Prepared, prepare
from l2l.experiments.verdict import VerdictField, judge, pair_rows, win_matrix, write_verdict
from l2l.report.console import progress_bar
from l2l.report.run_directory import RunDirectory, environment

RESULT = "meta_evaluate.json"
HOW = ("overwrite", "processes", "progress")
"""Fields that say how an evaluation is run, not what it is."""


@dataclass(frozen=True)
class Entered:
    """A setting with everybody who takes part in it."""

    prepared: Prepared
    entries: Sequence[Entry]
    left_out: Mapping[str, str]


def run_meta_evaluation(config: MetaEvaluateConfig) -> dict[str, Any]:
    """Run the evaluation; what ``meta_evaluate.json`` holds.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
    """
    torch.set_num_threads(1)  # the runs share the processors
    prepared = [prepare(config, setting) for setting in config.settings]
    what = {name: value for name, value in asdict(config).items() if name not in HOW}
    folder = RunDirectory(config.out, what, config.overwrite).create()
    runs = Path(config.runs) if config.runs else folder.path / "runs"
    entered = [_enter(config, setting, runs / "_tuners") for setting in prepared]
    tuning = [found for setting in entered for found in _tuning(config, setting, runs)]
    planned = len(tuning) + sum(len(_cells(setting)) for setting in entered) * config.seeds
    with progress_bar("runs", planned, visible=config.progress) as advance:
        done = _run(config, tuning, "learning rates", advance)
        points = _chosen(config, entered, done)
        table = _table(config, entered, points, runs)
        done += _run(config, table, "table", advance)
    verdict = _verdict(config, entered, points, done)
    write_verdict(folder.path / RESULT, verdict)
    field = _field(entered, done)
    draw(folder.path, field, win_matrix(field))
    print_tables(field, points, verdict)
    folder.finish({name: value for name, value in verdict.items() if name not in ("runs", "pairs", "environment")})
    print(f"verdict: {folder.path / RESULT}")
    return verdict


def _enter(config: MetaEvaluateConfig, prepared: Prepared, tuners: Path) -> Entered:
    """Everybody who takes part, their tuners as they are now."""
    tasks = prepared.setting.tasks
    frozen = {label: str(freeze(tuner, tuners)) for label, tuner in prepared.tuners.items()}
    own = [Entry.of(contender, frozen.get(contender.label), tasks) for contender in config.contenders]
    built: Controls = build_controls(config, prepared, tuners)
    return Entered(prepared, [*own, *built.entries], built.left_out)


def _cells(entered: Entered) -> list[tuple[str, Entry]]:
    return list(product(entered.prepared.setting.tasks, entered.entries))


def _points(config: MetaEvaluateConfig, entered: Entered, entry: Entry) -> list[Point]:
    return entry.points(entered.prepared.setting.grid or config.grid, config.step_fraction_grid)


def _tuning(config: MetaEvaluateConfig, entered: Entered, runs: Path) -> list[Trial]:
    """The whole grid on the tuning seed, for all who have a choice."""
    setting = entered.prepared.setting
    return [
        trial(config, setting, entry, task, point, config.tuning_seed, True, runs)
        for task, entry in _cells(entered)
        for point in _points(config, entered, entry)
        if len(_points(config, entered, entry)) > 1
    ]


Chosen = dict[tuple[str, str, str], Point]
"""(setting, task, contender) -> the point chosen."""


def _chosen(config: MetaEvaluateConfig, entered: Sequence[Entered], tuning: Sequence[Run]) -> Chosen:
    points: Chosen = {}
    for setting in entered:
        for task, entry in _cells(setting):
            where = setting.prepared.setting.name, task, entry.label
            options = _points(config, setting, entry)
            found = [found for found in tuning if (*found.pair, found.contender) == where]
            points[where] = choose(found) if len(options) > 1 else options[0]
    return points


def _table(config: MetaEvaluateConfig, entered: Sequence[Entered], points: Chosen, runs: Path) -> list[Trial]:
    """Every pair and contender at the point chosen, over the seeds."""
    found = []
    for setting, seed in product(entered, range(config.seeds)):
        own = setting.prepared.setting
        for task, entry in _cells(setting):
            point = points[own.name, task, entry.label]
            found.append(trial(config, own, entry, task, point, seed, False, runs))
    return found


def _run(config: MetaEvaluateConfig, trials: Sequence[Trial], what: str, advance: Any) -> list[Run]:
    """Run what is not done yet. Trials that come to the same run share it."""
    jobs = {planned.job.out: planned.job for planned in trials}
    open_jobs = [job for job in jobs.values() if not is_done(job)]
    if len(open_jobs) < len(jobs):
        print(f"continuing: {len(jobs) - len(open_jobs)} of {len(jobs)} runs for the {what} are done")
    for _ in range(len(trials) - len(open_jobs)):
        advance(float("nan"))
    run_jobs(open_jobs, config.processes, lambda record: advance(record["final_loss"]), run_tolerantly)
    return [outcome(planned, curve=not planned.tuning) for planned in trials]


def _field(entered: Sequence[Entered], done: Sequence[Run]) -> VerdictField:
    """The table's runs. Contenders that are not in every setting (a control left out in one) are in none of the figures."""
    common = [entry for entry in entered[0].entries if all(_has(setting, entry.label) for setting in entered)]
    majority = {
        (setting.prepared.setting.name, task): share
        for setting in entered
        for task, share in setting.prepared.majority.items()
    }
    return VerdictField(done, {entry.label: entry.role for entry in common}, list(majority), majority)


def _has(entered: Entered, label: str) -> bool:
    return any(entry.label == label for entry in entered.entries)


def _verdict(
    config: MetaEvaluateConfig, entered: Sequence[Entered], points: Chosen, done: Sequence[Run]
) -> dict[str, Any]:
    field = _field(entered, done)
    judged = config.judged_contender.label
    tuners = field.labels("tuner")
    return {
        "judged": judged,
        **judge(field, judged),
        "by_setting": {setting.prepared.setting.name: judge(_field([setting], done), judged) for setting in entered},
        "by_tuner": {label: judge(field, label) for label in tuners},
        "departures": departures(config, entered),
        "protocol": {
            "document": "docs/protocol.md",
            "config": asdict(config),
            "controls_left_out": {setting.prepared.setting.name: dict(setting.left_out) for setting in entered},
            "chosen": _choices(config, entered, points),
        },
        "win_matrix": {"contenders": list(field.roles), "row_beats_column": win_matrix(field)},
        "pairs": {label: pair_rows(field, label) for label in tuners},
        "runs": [_record(found) for found in done],
        "environment": environment(),
    }


def departures(config: MetaEvaluateConfig, entered: Sequence[Entered]) -> list[str]:
    """Where an evaluation asks less than the protocol does, whose numbers are the configuration's defaults."""
    missing = [name for name in CONTROLS if name not in config.controls]
    found = [f"no controls {', '.join(missing)}"] if missing else []
    asked = {"passes": min(setting.passes or config.passes for setting in config.settings)}
    asked |= {name: getattr(config, name) for name in ("train_size", "dev_size", "test_size")}
    whole = MetaEvaluateConfig()
    found += [f"{n} {asked[n]} instead of {getattr(whole, n)}" for n in asked if asked[n] < getattr(whole, n)]
    if config.seeds < SEEDS:
        found.append(f"{config.seeds} seeds instead of {SEEDS}")
    if not any(contender.role == BASELINE_DIZO for contender in config.contenders):
        found.append("no DiZO")
    for setting in entered:
        for label in sorted({entry.label for entry in setting.entries if len(_points(config, setting, entry)) < 2}):
            found.append(f"setting {setting.prepared.setting.name!r}: one learning rate for {label!r}, not tuned")
    return found


def _choices(config: MetaEvaluateConfig, entered: Sequence[Entered], points: Chosen) -> list[dict[str, Any]]:
    grids = {setting.prepared.setting.name: setting.prepared.setting.grid or config.grid for setting in entered}
    return [
        {
            "setting": setting,
            "task": task,
            "contender": contender,
            **point,
            "at_edge": at_edge(point, config.step_fraction_grid if point["lr"] == "auto" else grids[setting]),
        }
        for (setting, task, contender), point in points.items()
    ]


def _record(found: Run) -> dict[str, Any]:
    """A run as it is written: everything but its curve, which lies in its folder."""
    kept = {name: value for name, value in asdict(found).items() if name not in ("curve", "point")}
    return kept | {"size": point_size(found.point), **found.point}
