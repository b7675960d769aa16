"""``l2l quickstart``: learn a tuner for the embedded model, then compare it with MeZO, DiZO and a random sigma, offline."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from l2l.arguments import Arguments
from l2l.experiments.runner import Runner, check_all, executor_of, run_summary
from l2l.experiments.spec import CompareConfig, Contender, Setting
from l2l.experiments.stats import Curve
from l2l.experiments.tables import draw_curves
from l2l.methods.base import check_counts
from l2l.models.load import load_model
from l2l.report.console import print_table, spread
from l2l.report.run_directory import METRICS, SUMMARY, RunDirectory, read_metrics
from l2l.tasks import get_task
from l2l.tasks.tiny_world import POOL, VALIDATION
from l2l.tuners import Provenance, Tuner

RECIPE = Path(__file__).with_name("quickstart.yaml")


@dataclass(frozen=True)
class QuickstartConfig(Arguments):
    """Learn a tuner for the embedded model, then compare it with MeZO, DiZO and a random sigma on held-out tasks."""

    out: str = "runs/quickstart"
    """Directory for everything the run leaves."""
    tasks: list[str] = field(default_factory=lambda: ["world_stars", "world_opposite"])
    """Held-out tasks: none of them may be in the meta-training pool."""
    seeds: int = 3
    """Seeds per task and method."""
    passes: int | None = None
    """Forward passes per run; None: as recorded."""
    meta_steps: int | None = None
    """Outer steps of meta-training; None: as recorded."""
    tuner: str | None = None
    """A tuner to use instead of learning one, e.g. ``l2l-tiny``."""
    processes: int = 2
    """Runs at a time, one thread each."""
    tune: bool = False
    """Run the whole learning-rate grid on one seed and write ``best_lr.yaml`` instead of comparing."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        super().__post_init__()
        passes, meta_steps = (1 if value is None else value for value in (self.passes, self.meta_steps))
        check_counts(seeds=self.seeds, processes=self.processes, passes=passes, meta_steps=meta_steps)


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run the quickstart; what ``summary.json`` holds. ValueError for a task of the pool, or if ``out`` holds another run."""
    torch.set_num_threads(1)  # the embedded model is too small for more, and the runs share the processors
    recipe = yaml.safe_load(RECIPE.read_text())
    for task in config.tasks:
        if get_task(task).name in (*POOL, *VALIDATION):
            raise ValueError(f"task {task!r} serves meta-training: the comparison needs held-out tasks")
        if not config.tune and task not in recipe["best"]:
            known = ", ".join(recipe["best"])
            raise ValueError(f"task {task!r} has no recorded learning rates: take {known}, or `l2l compare`, which finds them")
    if config.tuner:
        Tuner.from_pretrained(config.tuner)  # bad input is refused before anything is written
    with RunDirectory(config.out, asdict(config), config.overwrite) as folder:
        return _quickstart(config, recipe, folder.create())


def _quickstart(config: QuickstartConfig, recipe: dict[str, Any], folder: RunDirectory) -> dict[str, Any]:
    tuner = config.tuner or _learn_tuner(config, recipe["meta"], folder.path / "tuner")
    about = Provenance("l2l/tiny", recipe={"control": "fixed random sigma"})
    drawn = Tuner.for_model(load_model("l2l/tiny"), "table", start="random", provenance=about)
    control = str(drawn.save_pretrained(folder.path / "random-sigma"))
    planned = {"method": recipe["plan"]["method"], "options": recipe["plan"]["options"], "grid": [recipe["plan"]["lr"]]}
    compared = CompareConfig(
        out=config.out,
        settings=[Setting("l2l-tiny", tasks=config.tasks)],
        methods=[
            Contender("mezo", "mezo"),
            Contender("dizo", "dizo"),
            Contender("learned", tuner=tuner, **planned),
            Contender("random sigma", tuner=control, **planned),
        ],
        grid=recipe["grid"],
        passes=config.passes or recipe["passes"],
        **{name: getattr(config, name) for name in ("seeds", "processes", "progress")},
    )
    runs = folder.path / "runs"
    (checked,) = check_all(compared, compared.contenders)
    place = checked.frozen(runs / "_tuners")
    runner = Runner(compared, executor_of("local", config.processes), [place], runs)
    if config.tune:
        results = [run_summary(run) for run in runner.tune()]
        text = yaml.safe_dump({"best": best_lr(results)}, sort_keys=False)
        (folder.path / "best_lr.yaml").write_text(text)
        print(text)
    else:
        cells = product(place.cells, place.entries)
        tuned, own = recipe["best"], recipe["plan"]["lr"]
        done = runner.table({(cell, label): {"lr": tuned[cell.task].get(label, own)} for cell, label in cells})
        results = [run_summary(run) for run in done]
        print_table(f"held-out tasks, {config.seeds} seeds, mean ± standard deviation", table(results))
        panels: dict[str, dict[str, Curve]] = {}  # dev loss against forward passes, and against seconds
        for x in ("passes", "seconds"):
            for (task, method), records in by_method(results).items():
                panels.setdefault(f"{task}, by {x}", {})[method] = mean_curve(records, x)
        methods = list(dict.fromkeys(record["method"] for record in results))
        labels = ["forward passes"] * len(config.tasks) + ["seconds of training"] * len(config.tasks)
        draw_curves(folder.path / "quickstart.png", panels, methods, labels, "dev loss (nats), mean over seeds")
    used = {"tuner": tuner, "random_sigma": control, "passes": compared.passes}
    summary = {"results": results, **used, "config": asdict(config)}
    folder.finish(summary)
    print(f"tuner: {tuner}\nsummary: {folder.path / SUMMARY}")
    return summary


def _learn_tuner(config: QuickstartConfig, meta: dict[str, Any], out: Path) -> str:
    from l2l.meta.run import meta_train

    options = dict(meta)
    if config.meta_steps is not None:  # shorter training is judged by shorter runs
        options |= {"steps": config.meta_steps, "validation_steps": min(config.meta_steps, meta["validation_steps"])}
    if not (out / SUMMARY).is_file():  # else learned before the quickstart was interrupted
        meta_train("l2l/tiny", out=str(out), progress=config.progress, **options)
    return str(out)


def mean_curve(records: Sequence[dict[str, Any]], x: str) -> Curve:
    """Dev loss against passes or seconds, the mean over runs of both, evaluation by evaluation; it begins untrained."""
    curves = []
    for record in records:
        rows = [row for row in read_metrics(Path(record["run"]) / METRICS) if row["dev_loss"]]
        initial = json.loads((Path(record["run"]) / SUMMARY).read_text())["initial_dev_loss"]
        curves.append([(0.0, initial), *((float(row[x]), float(row["dev_loss"])) for row in rows)])
    return [(mean(a for a, _ in points), mean(b for _, b in points)) for points in zip(*curves, strict=True)]


def best_lr(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Task -> method -> the learning rate of lowest dev loss."""
    best: dict[str, dict[str, float]] = {}
    for record in sorted(results, key=lambda record: -record["dev_loss"]):
        best.setdefault(record["task"], {})[record["method"]] = record["lr"]
    return best


def by_method(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(task, method) -> its results."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in results:
        groups.setdefault((record["task"], record["method"]), []).append(record)
    return groups


def table(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per task and method, over seeds."""
    return [
        {
            "task": task,
            "method": method,
            "lr": f"{records[0]['lr']:g}",
            "final loss": spread([record["final_loss"] for record in records]),
            "accuracy": spread([record["accuracy"] for record in records]),
            "forward passes": str(round(sum(record["passes"] for record in records) / len(records))),
            "seconds": spread([record["seconds"] for record in records], 1),
        }
        for (task, method), records in by_method(results).items()
    ]
