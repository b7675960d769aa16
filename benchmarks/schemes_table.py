"""One table of methods over tasks and tuning schemes, with intervals, from one configuration file.

For each (task, scheme, method) every learning rate that the file names runs over all seeds. The one with the least mean
dev loss is reported, on test rows, with the weights of its best step by dev. Runs that are done are not done again: the
same command continues an interrupted one.

python benchmarks/schemes_table.py configs/schemes/stories260K.yaml --root ../shared --out runs/schemes
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

import yaml

from l2l.experiments.runner import Job, finished, located, run_folder, run_jobs, run_tolerantly
from l2l.meta.config import MetaTrainConfig
from l2l.report.console import print_table, progress_bar
from l2l.report.files import write_json, write_whole
from l2l.report.run_directory import CONFIG, SUMMARY
from l2l.tools.bench import hardware
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig

LEARNED = "learned"
NO_LR = 1e-6
"""Of runs that take no steps; it has no effect."""
GIVEN = frozenset(
    {"model", "task", "method", "tuner", "lr", "seed", "out", "data_dir", "overwrite", "progress", "save_model"}
)
"""Fields of a run that the script sets."""
NOTE = (
    "test: mean over the seeds (standard deviation of the seeds in brackets), with the weights of the best step by dev. "
    "95 % interval: over draws of the test rows, the mean of the seeds' ends; it leaves out what another seed would change. "
    "lr: of those named in the configuration, the one with the least mean dev loss."
)

Group: TypeAlias = dict[str, list[Job]]
"""The runs of one (task, scheme, method): jobs over the seeds, by learning rate."""


@dataclass(frozen=True)
class Plan:
    """What the file says."""

    model: str
    tasks: list[str]
    schemes: list[str]
    methods: dict[str, dict[str, Any]]
    """Method -> ``lr``: a value or a list of values, or these by scheme; ``options``: further fields of a run, for the
    method on every scheme."""
    data_dir: str | None = None
    baselines: list[str] = field(default_factory=list)
    """Methods that train nothing: one run per task and seed, of no scheme."""
    seeds: list[int] = field(default_factory=lambda: [0])
    passes: int = 2000
    """Forward passes per run; a backward pass counts as two."""
    run: dict[str, Any] = field(default_factory=dict)
    """Fields of every run."""
    by_scheme: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further fields of the runs of a scheme."""
    tuner: str | dict[str, Any] | None = None
    """Of the learned method: a directory or name, or how to learn one: fields of ``l2l meta-train``."""


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is unknown or missing, a method has no learning rate for a scheme, or no tuner.
    """
    found = yaml.safe_load(path.read_text())
    known, needed = {one.name for one in fields(Plan)}, {"model", "tasks", "schemes", "methods"}
    given = set(found) if isinstance(found, dict) else set()
    if given - known or needed - given:
        wrong = sorted(given - known) or sorted(needed - given)
        raise ValueError(
            f"{path}: {wrong[0]!r} is {'unknown' if given - known else 'missing'}; fields: {sorted(known)}"
        )
    plan = Plan(**found)
    for method, said in plan.methods.items():
        if not set(said) <= {"lr", "options"} or "lr" not in said:
            raise ValueError(f"{path}: method {method!r} must have 'lr' and may have 'options', nothing else")
        for scheme in plan.schemes:
            rates(said["lr"], scheme)
    for options in (plan.run, *plan.by_scheme.values(), *(said.get("options", {}) for said in plan.methods.values())):
        _check_fields(path, options, FineTuneConfig, GIVEN)
    if isinstance(plan.tuner, dict):
        _check_fields(path, plan.tuner, MetaTrainConfig, frozenset({"model", "data_dir", "out"}))
    if LEARNED in plan.methods and plan.tuner is None:
        raise ValueError(f"{path}: method {LEARNED!r} needs 'tuner': a directory, or fields of l2l meta-train")
    for name in plan.baselines:
        if name not in baseline_names():
            raise ValueError(f"{path}: no baseline {name!r}; there are {', '.join(baseline_names())}")
    return plan


def _check_fields(path: Path, options: Mapping[str, Any], kind: type, taken: frozenset[str]) -> None:
    """Refuse options that the configuration class has not, or that the script sets itself."""
    wrong = sorted(set(options) - ({one.name for one in fields(kind)} - taken))
    if wrong:
        what = "is set by the script" if wrong[0] in taken else f"is no field of {kind.__name__}"
        raise ValueError(f"{path}: option {wrong[0]!r} {what}: leave it out")


def rates(said: Any, scheme: str) -> list[Any]:
    """Learning rates of a scheme, from a value, a list, or either by scheme.

    Raises:
        ValueError: there is none for the scheme.
    """
    own = said.get(scheme) if isinstance(said, Mapping) else said
    found = list(own) if isinstance(own, list) else [own]
    if not found or None in found:
        raise ValueError(f"no lr for scheme {scheme!r}: give a number, a list or 'auto' for each scheme")
    return found


def groups_of(plan: Plan, root: str, out: Path) -> dict[tuple[str, str, str], Group]:
    """All runs by (task, scheme, method); those of baselines have the scheme ``none``."""
    found: dict[tuple[str, str, str], Group] = {}
    for task in plan.tasks:
        for name in plan.baselines:
            found[task, "none", name] = {"": [_job(plan, root, out, task, name, None, seed, {}) for seed in plan.seeds]}
        for scheme in plan.schemes:
            for method, said in plan.methods.items():
                options = {"scheme": scheme, **plan.by_scheme.get(scheme, {}), **said.get("options", {})}
                found[task, scheme, method] = {
                    str(lr): [_job(plan, root, out, task, method, lr, seed, options) for seed in plan.seeds]
                    for lr in rates(said["lr"], scheme)
                }
    return found


def _job(
    plan: Plan, root: str, out: Path, task: str, method: str, lr: Any, seed: int, options: Mapping[str, Any]
) -> Job:
    steps = max(1, plan.passes // 2)
    shared = {
        "model": located(plan.model, root),
        "data_dir": None if plan.data_dir is None else str(Path(root) / plan.data_dir),
        "steps": steps,
        "max_passes": plan.passes,
        "eval_every": max(1, steps // 10),
        "checkpoint_every": steps,
    }
    tuner = tuner_folder(plan, root, out) if method == LEARNED else None
    folder = run_folder(out, task, options.get("scheme", "none"), method, lr or "", f"s{seed}")
    return Job(method, task, method, lr or NO_LR, seed, folder, tuner, shared | plan.run | dict(options))


def tuner_folder(plan: Plan, root: str, out: Path) -> str | None:
    """Where the tuner is, or is going to be."""
    if isinstance(plan.tuner, str):
        return located(plan.tuner, root)
    return None if plan.tuner is None else str(out / "tuner")


def learn_tuner(plan: Plan, root: str, out: Path) -> None:
    """Meta-train the tuner that the plan describes, unless that was done before.

    Raises:
        ValueError: it was done before by another recipe, or the recipe is refused.
    """
    from l2l.meta.run import run_meta_training

    target = out / "tuner"
    if not isinstance(plan.tuner, dict) or LEARNED not in plan.methods:
        return
    if (target / SUMMARY).is_file():
        recorded = yaml.safe_load((target / CONFIG).read_text())
        other = next((name for name, value in plan.tuner.items() if recorded.get(name) != value), None)
        if other is not None:
            raise ValueError(
                f"the tuner in {target} was learned with another {other!r}: remove it, or choose another --out"
            )
        return
    data_dir = None if plan.data_dir is None else str(Path(root) / plan.data_dir)
    run_meta_training(
        MetaTrainConfig(model=located(plan.model, root), data_dir=data_dir, out=str(target), **plan.tuner)
    )


def row_of(task: str, scheme: str, method: str, group: Group) -> dict[str, Any]:
    """The row of a (task, scheme, method): of the learning rate with the least mean dev loss."""
    tried = {lr: [summary for job in jobs if (summary := finished(job))] for lr, jobs in group.items()}
    # A learning rate at which a seed diverged has fewer summaries than jobs, and is out.
    whole = {lr: found for lr, found in tried.items() if len(found) == len(group[lr])}
    head = {"task": task, "scheme": scheme, "method": method}
    if not whole:
        return head | {
            "lr": "diverged",
            "metric": "-",
            "test": "-",
            "95 % interval": "-",
            "train loss": "-",
            "passes": "-",
        }
    lr = min(whole, key=lambda lr: fmean(one["best"]["dev"]["loss"] for one in whole[lr]))
    scores = [one["best"]["test"] for one in whole[lr]]
    return head | {
        "lr": lr or "-",
        "metric": scores[0]["metric"],
        "test": spread([score["value"] for score in scores]),
        "95 % interval": ends([score.get("interval") for score in scores]),
        "train loss": f"{fmean(one['final_loss'] for one in whole[lr]):.3f}",
        "passes": f"{fmean(one['passes'] for one in whole[lr]):.0f}",
    }


def spread(values: Sequence[float]) -> str:
    """Mean, and where there are several the standard deviation in brackets."""
    return f"{fmean(values):.3f}" + (f" ({stdev(values):.3f})" if len(values) > 1 else "")


def ends(intervals: Sequence[Sequence[float] | None]) -> str:
    """Mean ends of the seeds' intervals; a dash where a summary has none."""
    found = [interval for interval in intervals if interval is not None]
    if len(found) < len(intervals):
        return "-"
    return f"{fmean(low for low, _ in found):.3f} to {fmean(high for _, high in found):.3f}"


def markdown(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The table as a page."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"# {title}\n\n{table}\n\n{NOTE}\n"


def main() -> None:
    """Run what is missing; print the table, write it as Markdown and JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("config", type=Path)
    options.add_argument("--root", default=".", help="directory that model and data_dir are below")
    options.add_argument("--out", type=Path, default=Path("runs/schemes"))
    options.add_argument("--processes", type=int, default=1, help="runs side by side, a thread each")
    given = options.parse_args()
    try:
        plan = read_plan(given.config)
        learn_tuner(plan, given.root, given.out)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"schemes_table: {error}") from error
    groups = groups_of(plan, given.root, given.out)
    jobs = [job for group in groups.values() for own in group.values() for job in own]
    with progress_bar("runs", len(jobs)) as advance:
        run_jobs(jobs, given.processes, lambda record: advance(record["final_loss"]), run_tolerantly)
    rows = [row_of(*names, group) for names, group in groups.items()]
    title = f"{Path(plan.model).name}: methods by tuning scheme, {plan.passes} passes, {len(plan.seeds)} seeds"
    print_table(title, rows)
    print(NOTE)
    write_whole(given.out / "table.md", lambda path: path.write_text(markdown(rows, title)))
    write_json(given.out / "table.json", hardware() | {"plan": vars(plan), "rows": rows})


if __name__ == "__main__":
    main()
