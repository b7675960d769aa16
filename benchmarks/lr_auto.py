"""``lr="auto"`` against the best learning rate of a grid, at equal forward passes, over tasks and tuning schemes.

For each (task, scheme) MeZO runs with every value of the scheme's grid and once with ``auto``, over the same seeds. The
table holds the final training loss of the best grid value, chosen with hindsight by that very loss, against auto's.
Runs that are done are not done again: the same command continues an interrupted one.

python benchmarks/lr_auto.py --help
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from l2l.experiments import runner as engine
from l2l.experiments.spec import CompareConfig, Contender, SchemeEntry, Setting
from l2l.experiments.stats import Cell, Run
from l2l.report.console import print_table
from l2l.report.run_directory import write_json
from l2l.tools.bench import hardware

GRIDS = {"full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2, 3e-2)}
"""Half decades around what ``l2l lr-probe`` advises for stories260K."""
WITHIN = 1.1
"""auto's loss over the best of the grid up to which it counts as within 10 %."""
WANTED = 6, 8
"""Pairs within that, of so many."""

NOTE = (
    "Losses are means over the seeds, on train rows, with the last weights. The best of the grid is chosen by that same loss. "
    "'edge': the best is the first or the last value of its grid, so a better one may lie outside."
)


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="../shared/models/stories260K")
    options.add_argument("--data-dir", dest="data_dir", default="../shared/data")
    options.add_argument("--tasks", nargs="+", default=["sst2", "trec", "ag_news", "rte"])
    options.add_argument("--schemes", nargs="+", default=list(GRIDS))
    options.add_argument("--grid", nargs="+", default=[], help="of a scheme: full=1e-4,3e-4 lora=1e-3; default: " + str(GRIDS))
    options.add_argument("--epsilon", nargs="+", default=[], help="of a scheme: full=1e-3 lora=1e-2; default: the scheme's")
    options.add_argument("--step_fraction", "--beta", type=float, default=0.1, help="of auto")
    options.add_argument("--passes", type=int, default=2000, help="forward passes per run, third losses included")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options.add_argument("--method", default="mezo")
    options.add_argument("--batch_size", type=int, default=16)
    options.add_argument("--max_length", type=int)
    options.add_argument("--train_size", type=int, default=1000)
    options.add_argument("--dev_size", type=int, default=32)
    options.add_argument("--test_size", type=int, default=500, help="rows of train and test that losses are read on")
    options.add_argument("--processes", type=int, default=1, help="runs side by side, a thread each")
    options.add_argument("--out", default="runs/lr-auto", help="directory of the runs and of lr_auto.json")
    options.add_argument("--tiny", action="store_true", help="a few passes: whether it runs")
    return options


def by_scheme(given: Sequence[str], name: str) -> dict[str, list[float]]:
    """``full=1e-4,3e-4`` and the like, by scheme.

    Raises:
        ValueError: a word is not ``scheme=number,…``.
    """
    found = {}
    for word in given:
        scheme, equals, values = word.partition("=")
        try:
            found[scheme] = sorted(float(value) for value in values.split(","))
        except ValueError as error:
            raise ValueError(f"--{name} {word!r} must be scheme=number or scheme=number,number,…") from error
        if not equals or not scheme:
            raise ValueError(f"--{name} {word!r} must begin with a scheme and '='")
    return found


def experiment(given: argparse.Namespace) -> CompareConfig:
    """The experiment that the options describe; each scheme's grid is given to its runs apart.

    Raises:
        ValueError: an epsilon is malformed.
    """
    epsilons = by_scheme(given.epsilon, "epsilon")
    shared = {name: getattr(given, name) for name in ("passes", "train_size", "dev_size", "test_size", "processes", "out")}
    setting = {name: getattr(given, name) for name in ("model", "tasks", "data_dir", "max_length", "batch_size")}
    schemes = [SchemeEntry(s, options={"epsilon": epsilons[s][0]} if s in epsilons else {}) for s in given.schemes]
    return CompareConfig(settings=[Setting("lr-auto", **setting)], schemes=[*schemes], evaluations=1, **shared)


def points(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Scheme -> the values of its grid, and auto.

    Raises:
        ValueError: a scheme has no grid, or a grid is malformed.
    """
    grids = {name: list(values) for name, values in GRIDS.items()} | by_scheme(given.grid, "grid")
    for scheme in given.schemes:
        if scheme not in grids:
            raise ValueError(f"scheme {scheme!r} has no grid: give one by --grid {scheme}=1e-3,1e-2")
    auto = {"lr": "auto", "step_fraction": given.step_fraction}
    return {scheme: [*({"lr": lr} for lr in grids[scheme]), auto] for scheme in given.schemes}


def compared(task: str, scheme: str, runs: Mapping[float | str, Sequence[Run]]) -> dict[str, Any]:
    """The row of a (task, scheme): auto against the best of the grid; runs by learning rate, over the seeds."""
    means = {lr: fmean(run.train_loss for run in own) for lr, own in runs.items()}
    grid = {lr: loss for lr, loss in means.items() if lr != "auto"}
    best = min(grid, key=lambda lr: grid[lr])
    starts = [run.initial_loss for own in runs.values() for run in own if isfinite(run.initial_loss)]
    return {
        "task": task,
        "scheme": scheme,
        "before": fmean(starts) if starts else float("nan"),
        "best lr": best,
        "edge": "yes" if best in (min(grid), max(grid)) else "no",
        "best of grid": grid[best],
        "auto": means["auto"],
        "ratio": means["auto"] / grid[best],
        "within 10 %": "yes" if means["auto"] <= WITHIN * grid[best] else "no",
    }


def main() -> None:
    """Run what is missing, print a table, write JSON."""
    given = parser().parse_args()
    if given.tiny:
        given.passes, given.train_size, given.dev_size, given.test_size, given.seeds = 8, 24, 4, 8, [0]
    try:
        config, grids = experiment(given), points(given)
        checked = engine.check_all(config, [Contender(given.method, given.method)])
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"lr_auto: {error}") from error
    places = [place.frozen(Path(given.out) / "runs" / "_tuners") for place in checked]
    runner = engine.Runner(config, engine.executor_of("local", given.processes), places, Path(given.out) / "runs")
    trials = [
        runner.plan(place, cell, label, point, seed, False)
        for place in places
        for cell in place.cells
        for label in place.entries
        for point in grids[place.scheme.name]
        for seed in given.seeds
    ]
    found: dict[Cell, dict[float | str, list[Run]]] = {}
    for run in runner.run(trials, "grids"):
        found.setdefault(run.cell, {}).setdefault(run.point["lr"], []).append(run)
    rows = [compared(cell.task, cell.scheme, own) for cell, own in found.items()]
    print_table(f"lr=auto against the best of a grid, {given.passes} passes", rows)
    good = sum(row["within 10 %"] == "yes" for row in rows)
    print(f"{good} of {len(rows)} pairs within 10 % (wanted: {WANTED[0]} of {WANTED[1]}). {NOTE}")
    losses = {
        f"{cell.task} {cell.scheme}": {str(lr): [run.train_loss for run in own] for lr, own in by_lr.items()}
        for cell, by_lr in found.items()
    }
    result = hardware() | {"settings": vars(given), "rows": rows, "losses": losses, "within": good}
    write_json(Path(given.out) / "lr_auto.json", result)


if __name__ == "__main__":
    main()
