"""``lr="auto"`` against the best learning rate of a grid, at equal forward passes, over tasks and tuning schemes.

For each (task, scheme) MeZO runs with every value of the scheme's grid and once with ``auto``, over the same seeds. The
table holds the final training loss of the best grid value, chosen with hindsight by that very loss, against auto's.
Runs that are done are not done again: the same command continues an interrupted one.

python benchmarks/lr_auto.py --help
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from l2l.experiments.runner import Job, finished, run_folder, run_jobs, run_tolerantly
from l2l.report.console import print_table, progress_bar
from l2l.report.files import write_json
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
    """What the script is told."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="../shared/models/stories260K")
    options.add_argument("--data-dir", dest="data_dir", default="../shared/data")
    options.add_argument("--tasks", nargs="+", default=["sst2", "trec", "ag_news", "rte"])
    options.add_argument("--schemes", nargs="+", default=list(GRIDS))
    options.add_argument(
        "--grid", nargs="+", default=[], help="of a scheme: full=1e-4,3e-4 lora=1e-3; default: " + str(GRIDS)
    )
    options.add_argument(
        "--epsilon", nargs="+", default=[], help="of a scheme: full=1e-3 lora=1e-2; default: the scheme's"
    )
    options.add_argument("--beta", type=float, default=0.1, help="of auto")
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


def jobs_of(given: argparse.Namespace) -> dict[tuple[str, str], dict[float | str, list[Job]]]:
    """Jobs by (task, scheme), by learning rate, one per seed.

    Raises:
        ValueError: a scheme has no grid, or a grid or an epsilon is malformed.
    """
    grids = {name: list(values) for name, values in GRIDS.items()} | by_scheme(given.grid, "grid")
    epsilons = by_scheme(given.epsilon, "epsilon")
    for scheme in given.schemes:
        if scheme not in grids:
            raise ValueError(f"scheme {scheme!r} has no grid: give one by --grid {scheme}=1e-3,1e-2")
    found: dict[tuple[str, str], dict[float | str, list[Job]]] = {}
    for task in given.tasks:
        for scheme in given.schemes:
            epsilon = epsilons.get(scheme, [])
            found[task, scheme] = {
                lr: [_job(given, task, scheme, lr, seed, epsilon) for seed in given.seeds]
                for lr in (*grids[scheme], "auto")
            }
    return found


def _job(given: argparse.Namespace, task: str, scheme: str, lr: Any, seed: int, epsilon: Sequence[float]) -> Job:
    names = ("model", "data_dir", "batch_size", "max_length", "train_size", "dev_size", "test_size")
    steps = max(1, given.passes // 2)
    options = {name: getattr(given, name) for name in names} | {
        "scheme": scheme,
        "steps": steps,
        "max_passes": given.passes,
        "eval_every": steps,
        "checkpoint_every": steps,
    }
    options |= {"step_fraction": given.beta} if lr == "auto" else {}
    options |= {"epsilon": epsilon[0]} if epsilon else {}
    out = run_folder(Path(given.out), task, scheme, given.method, lr, f"s{seed}")
    return Job(f"{scheme} {lr}", task, given.method, lr, seed, out, options=options)


def compared(
    task: str, scheme: str, jobs: Mapping[float | str, Sequence[Job]], losses: Mapping[str, float]
) -> dict[str, Any]:
    """The row of a (task, scheme): auto against the best of the grid.

    Args:
        losses: final training loss by the folder of the run; infinite where it diverged.
    """
    means = {lr: fmean(losses[job.out] for job in own) for lr, own in jobs.items()}
    grid = {lr: loss for lr, loss in means.items() if lr != "auto"}
    best = min(grid, key=lambda lr: grid[lr])
    starts = [summary["initial_loss"] for own in jobs.values() for job in own if (summary := finished(job))]
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
        table = jobs_of(given)
    except ValueError as error:
        raise SystemExit(f"lr_auto: {error}") from error
    jobs = [job for pair in table.values() for own in pair.values() for job in own]
    with progress_bar("runs", len(jobs)) as advance:
        records = run_jobs(jobs, given.processes, lambda record: advance(record["final_loss"]), run_tolerantly)
    losses = {job.out: record["final_loss"] for job, record in zip(jobs, records, strict=True)}
    rows = [compared(task, scheme, own, losses) for (task, scheme), own in table.items()]
    print_table(f"lr=auto against the best of a grid, {given.passes} passes", rows)
    good = sum(row["within 10 %"] == "yes" for row in rows)
    print(f"{good} of {len(rows)} pairs within 10 % (wanted: {WANTED[0]} of {WANTED[1]}). {NOTE}")
    grids = {f"{task} {scheme}": _losses(own, losses) for (task, scheme), own in table.items()}
    target = Path(given.out) / "lr_auto.json"
    write_json(target, hardware() | {"settings": vars(given), "rows": rows, "losses": grids, "within": good})


def _losses(own: Mapping[float | str, Sequence[Job]], losses: Mapping[str, float]) -> dict[str, list[float]]:
    """Final losses of all seeds by learning rate."""
    return {str(lr): [losses[job.out] for job in jobs] for lr, jobs in own.items()}


if __name__ == "__main__":
    main()
