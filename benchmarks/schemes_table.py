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
from typing import Any

import yaml

from l2l.experiments import runner as engine
from l2l.experiments.spec import CompareConfig, Contender, Entry, Place, SchemeEntry, Setting, located
from l2l.experiments.stats import Point
from l2l.experiments.tables import Table, Text, markdown
from l2l.meta.config import MetaTrainConfig
from l2l.report.console import print_table
from l2l.report.run_directory import CONFIG, SUMMARY, write_json, write_whole
from l2l.tools.bench import hardware
from l2l.train.baselines import baseline_names
from l2l.train.config import FineTuneConfig

LEARNED = "learned"
NO_STEPS: Point = {"lr": 1e-6}
"""Point of runs that take no steps; it has no effect."""
GIVEN = frozenset({"model", "task", "method", "tuner", "lr", "seed", "out", "data_dir", "overwrite", "progress", "save"})
"""Fields of a run that the script sets."""
COLUMNS = ("task", "scheme", "method", "lr", "metric", "test", "95 % interval", "train loss", "passes")
NOTE = (
    "test: mean over the seeds (standard deviation of the seeds in brackets), with the weights of the best step by dev. "
    "95 % interval: over draws of the test rows, the mean of the seeds' ends; it leaves out what another seed would change. "
    "lr: of those named in the configuration, the one with the least mean dev loss."
)


@dataclass(frozen=True)
class Plan:
    """The fields of the file."""

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
        raise ValueError(f"{path}: {wrong[0]!r} is {'unknown' if given - known else 'missing'}; fields: {sorted(known)}")
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


def experiment(plan: Plan, root: str, out: Path, processes: int = 1) -> CompareConfig:
    """The experiment that a plan describes; methods and their learning rates are given to its runs apart."""
    run = dict(plan.run)
    setting = {name: run.pop(name) for name in ("batch_size", "max_length") if name in run}
    sizes = {name: run.pop(name) for name in ("train_size", "dev_size", "test_size") if name in run}
    return CompareConfig(
        out=str(out),
        root=root,
        settings=[Setting("model", plan.model, plan.tasks, data_dir=plan.data_dir, **setting)],
        schemes=[SchemeEntry(name, options=run | plan.by_scheme.get(name, {})) for name in plan.schemes],  # pyright: ignore[reportArgumentType]
        passes=plan.passes,
        evaluations=10,
        processes=processes,
        **sizes,
    )


def places_of(plan: Plan, config: CompareConfig, tuner: str | None, tuners: Path) -> dict[str, Place]:
    """Places by what the table calls their scheme; those of baselines are ``none``.

    Raises:
        ValueError, FileNotFoundError: a model, task or tuner cannot be had, or a method is refused.
    """
    (setting,) = config.settings
    found: dict[str, Place] = {}
    if plan.baselines:
        nothing = dict.fromkeys(setting.tasks)
        entries = {name: Entry(Contender(name, name), nothing) for name in plan.baselines}
        shared = {name: value for name, value in config.tuning_schemes[0].options.items() if name in plan.run}
        found["none"] = Place(setting, SchemeEntry(options=shared), entries)
    for scheme in config.tuning_schemes:
        contenders = []
        for name, said in plan.methods.items():
            options = {key: value for key, value in said.get("options", {}).items() if key != "step_fraction"}
            auto = {"lr": "auto"} if "auto" in rates(said["lr"], scheme.name) else {}
            contenders.append(Contender(name, name, tuner=tuner if name == LEARNED else None, options=options | auto))
        checked = engine.check_place(config, setting, scheme, contenders, held_out=False)
        for label, reason in checked.left_out.items():
            raise ValueError(f"method {label!r} under scheme {scheme.name!r}: {reason}")
        found[scheme.name] = checked.frozen(tuners)
    return found


def points_of(plan: Plan, scheme: str, method: str) -> list[Point]:
    """The points at which a method runs under a scheme."""
    if scheme == "none":
        return [NO_STEPS]
    said = plan.methods[method]
    auto = {"lr": "auto", "step_fraction": said.get("options", {}).get("step_fraction", 0.1)}
    return [auto if lr == "auto" else {"lr": lr} for lr in rates(said["lr"], scheme)]


Groups = dict[tuple[str, str, str], dict[str, list[engine.Trial]]]
"""(task, scheme, method) -> learning rate -> trials over the seeds."""


def groups_of(plan: Plan, places: Mapping[str, Place], runner: engine.Runner) -> Groups:
    """All trials, task by task."""
    found: Groups = {}
    for task in plan.tasks:
        for scheme, place in places.items():
            (cell,) = (cell for cell in place.cells if cell.task == task)
            for method in place.entries:
                found[task, scheme, method] = {
                    "" if scheme == "none" else str(point["lr"]): [
                        runner.plan(place, cell, method, point, seed, False) for seed in plan.seeds
                    ]
                    for point in points_of(plan, scheme, method)
                }
    return found


def learn_tuner(plan: Plan, root: str, out: Path) -> str | None:
    """The plan's tuner, meta-trained unless that was done before.

    Raises:
        ValueError: it was done before by another recipe, or the recipe is refused.
    """
    from l2l.meta.run import run_meta_training

    if LEARNED not in plan.methods or plan.tuner is None:
        return None
    if isinstance(plan.tuner, str):
        return located(plan.tuner, root)
    target = out / "tuner"
    if (target / SUMMARY).is_file():
        recorded = yaml.safe_load((target / CONFIG).read_text())
        other = next((name for name, value in plan.tuner.items() if recorded.get(name) != value), None)
        if other is not None:
            raise ValueError(f"the tuner in {target} was learned with another {other!r}: remove it, or choose another --out")
        return str(target)
    data_dir = None if plan.data_dir is None else str(Path(root) / plan.data_dir)
    run_meta_training(MetaTrainConfig(model=located(plan.model, root), data_dir=data_dir, out=str(target), **plan.tuner))
    return str(target)


def row_of(task: str, scheme: str, method: str, group: Mapping[str, Sequence[engine.Trial]]) -> dict[str, Any]:
    """The row of a (task, scheme, method): of the learning rate with the least mean dev loss."""
    tried = {lr: [summary for trial in trials if (summary := trial.summary)] for lr, trials in group.items()}
    # A learning rate at which a seed diverged has fewer summaries than trials, and is out.
    whole = {lr: found for lr, found in tried.items() if len(found) == len(group[lr])}
    if not whole:
        return dict(zip(COLUMNS, (task, scheme, method, "diverged", *"-----"), strict=True))
    lr = min(whole, key=lambda lr: fmean(one["best"]["dev"]["loss"] for one in whole[lr]))
    scores = [one["best"]["test"] for one in whole[lr]]
    values = (
        scores[0]["metric"],
        spread([score["value"] for score in scores]),
        ends([score.get("interval") for score in scores]),
        f"{fmean(one['final_loss'] for one in whole[lr]):.3f}",
        f"{fmean(one['passes'] for one in whole[lr]):.0f}",
    )
    return dict(zip(COLUMNS, (task, scheme, method, lr or "-", *values), strict=True))


def spread(values: Sequence[float]) -> str:
    """Mean, and where there are several the standard deviation in brackets."""
    return f"{fmean(values):.3f}" + (f" ({stdev(values):.3f})" if len(values) > 1 else "")


def ends(intervals: Sequence[Sequence[float] | None]) -> str:
    """Mean ends of the seeds' intervals; a dash where a summary has none."""
    found = [interval for interval in intervals if interval is not None]
    if len(found) < len(intervals):
        return "-"
    return f"{fmean(low for low, _ in found):.3f} to {fmean(high for _, high in found):.3f}"


def main() -> None:
    """Run what is missing; print the table, write it as Markdown and JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("config", type=Path)
    options.add_argument("--root", default=".", help="directory that model and data_dir are below")
    options.add_argument("--out", type=Path, default=Path("runs/schemes"))
    options.add_argument("--processes", type=int, default=1, help="runs side by side, a thread each")
    given = options.parse_args()
    runs = given.out / "runs"
    try:
        plan = read_plan(given.config)
        config = experiment(plan, given.root, given.out, given.processes)
        places = places_of(plan, config, learn_tuner(plan, given.root, given.out), runs / "_tuners")
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"schemes_table: {error}") from error
    runner = engine.Runner(config, engine.executor_of("local", given.processes), list(places.values()), runs)
    groups = groups_of(plan, places, runner)
    runner.run([trial for group in groups.values() for own in group.values() for trial in own], "table")
    rows = [row_of(*names, group) for names, group in groups.items()]
    title = f"{Path(plan.model).name}: methods by tuning scheme, {plan.passes} passes, {len(plan.seeds)} seeds"
    print_table(title, rows)
    print(NOTE)
    table = Table("Test scores", COLUMNS, [[Text(str(row[name])) for name in COLUMNS] for row in rows])
    write_whole(given.out / "table.md", lambda path: path.write_text(markdown(title, [NOTE], [table])))
    write_json(given.out / "table.json", hardware() | {"plan": vars(plan), "rows": rows})


if __name__ == "__main__":
    main()
