"""``l2l meta-evaluate``: judge tuners by docs/protocol.md, from a configuration to ``meta_evaluate.json``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from l2l.experiments import spec, stats, tables
from l2l.experiments.controls import build_controls
from l2l.experiments.runner import Chosen, Runner, check_all, check_folder, executor_of, experiment_folder
from l2l.experiments.spec import MetaEvaluateConfig, Place, SchemeEntry, Setting
from l2l.experiments.stats import Cell, Run, RunTable
from l2l.experiments.tables import Table, Text, draw_curves, draw_matrix, finite, mean_curves
from l2l.models.load import EMBEDDED
from l2l.report.console import spread
from l2l.report.run_directory import RunDirectory, environment, write_whole
from l2l.tasks import get_task, load_splits
from l2l.tasks.tiny_world import POOL, VALIDATION

RESULT = "meta_evaluate.json"


def run_meta_evaluation(config: MetaEvaluateConfig) -> dict[str, Any]:
    """Run it; what ``meta_evaluate.json`` holds. Bad input: ValueError or FileNotFoundError before anything is written."""
    torch.set_num_threads(1)  # the runs share the processors
    check_folder(config)  # before models and rows are read, which check the rest
    executor = executor_of(config.executor, config.processes, config.ray_address)
    majority: dict[Cell, float] = {}
    for setting in config.settings:
        majority |= check_held_out(config, setting)
    checked = check_all(config, config.contenders)
    judged = config.judged_contender.label
    for reason in (reason for place in checked for reason in place.left_out.values()):
        raise ValueError(reason)
    tuners = [next(iter(place.entries[judged].tuners.values())) for place in checked]
    if None in tuners:
        raise ValueError(f"contender {judged!r} is to be judged, but names no tuner")
    with experiment_folder(config, checked) as (folder, runs):
        places, missing = [], {}
        for found, tuner in zip(checked, tuners, strict=True):
            place = found.frozen(runs / "_tuners")
            setting, steps, pool = place.setting, place.entries[judged].steps, pool_of(place.setting)
            built, missing[setting.name] = build_controls(config, setting, tuner, steps, pool, runs / "_tuners")
            places.append(replace(place, entries={**place.entries, **{one.contender.label: one for one in built}}))
        runner = Runner(config, executor, places, runs)
        done = runner.tune()
        chosen = runner.choose(done)
        done += runner.table({at: point for at, (point, _) in chosen.items()})
        return write_verdict(folder, config, places, missing, majority, chosen, done)


def pool_of(setting: Setting) -> tuple[str, ...]:
    """Tasks that tuners of a setting learn from; where it names none and its model is the embedded one, the package's."""
    return tuple(setting.pool) or (POOL if setting.model == EMBEDDED else ())


def check_held_out(config: MetaEvaluateConfig, setting: Setting) -> dict[Cell, float]:
    """Accuracy of the best constant answer on each held-out task's test rows.

    ValueError where tuners learn from one of the tasks or are chosen by it, or a pool is needed and missing;
    FileNotFoundError where rows are missing.
    """
    pool = pool_of(setting)
    validation = tuple(setting.validation) or (VALIDATION if setting.model == EMBEDDED else ())
    for name, tasks in (("its pool", pool), ("its validation tasks", validation)):
        for task in setting.tasks:
            if task in tasks:
                raise ValueError(
                    f"task {task!r} of setting {setting.name!r} is in {name}: tuners are judged on tasks that took no part "
                    "in making them"
                )
    data_dir = config.run_options(setting, SchemeEntry())["data_dir"]
    sizes = data_dir, config.train_size, config.dev_size
    if "static_table" in config.controls:
        if not pool:
            raise ValueError(f"setting {setting.name!r} has no pool: the control 'static_table' needs one; or leave it out")
        for name in pool:
            load_splits(get_task(name), *sizes, 0, config.tuning_seed)
    found = {}
    for name in setting.tasks:
        task = get_task(name)
        golds = [task.example(row).gold for row in load_splits(task, *sizes, config.test_size).test]
        found[Cell(setting.name, "full", name)] = stats.majority_share(golds) if task.metric == "accuracy" else 0.0
    return found


@final
@dataclass(frozen=True)
class Evidence:
    """Everything that a verdict is computed from. A pair of the protocol is a cell under scheme ``full``."""

    runs: RunTable
    roles: Mapping[str, str]  # contender -> role, in the order of the table
    majority: Mapping[Cell, float]  # accuracy of the best constant answer on each pair's test rows

    @staticmethod
    def of(places: Sequence[Place], done: Sequence[Run], majority: Mapping[Cell, float]) -> "Evidence":
        """Evidence from these places; a contender that is missing in one (a control left out) is in no figure."""
        shared = set.intersection(*(set(place.entries) for place in places))
        common = {label: entry.contender.role for label, entry in places[0].entries.items() if label in shared}
        cells = [cell for place in places for cell in place.cells]
        return Evidence(RunTable.of(done, cells, list(common)), common, majority)

    def labels(self, role: str) -> list[str]:
        """Labels of the contenders with this role."""
        return [label for label, found in self.roles.items() if found == role]

    @property
    def mezo(self) -> str:
        """Label of the MeZO baseline."""
        return self.labels(spec.BASELINE_MEZO)[0]

    def accuracy_status(self, tuner: str, cell: Cell) -> str:
        """See :func:`l2l.experiments.stats.accuracy_counts`."""
        mezo, own = (float(self.runs.values(label, "accuracy", [cell]).mean()) for label in (self.mezo, tuner))
        return stats.accuracy_counts(mezo, own, self.majority[cell])


def judge(evidence: Evidence, tuner: str) -> dict[str, Any]:
    """Figures of a tuner over all pairs, with their intervals; None where there was nothing to compare with."""
    runs, mezo = evidence.runs, evidence.mezo
    figures, intervals = {}, {}

    def enter(name: str, table: NDArray[np.float64] | None, statistic: stats.Statistic) -> None:
        figures[name] = None if table is None else stats.estimate(table, statistic)
        intervals[name] = None if table is None else list(stats.interval(table, statistic))

    dizo, controls = evidence.labels(spec.BASELINE_DIZO), evidence.labels(spec.CONTROL)
    enter("win_rate_over_mezo", runs.columns([tuner, mezo]), stats.win_rate)
    enter("win_rate_over_dizo", runs.columns([tuner, *dizo]) if dizo else None, stats.win_rate)
    enter("win_rate_over_controls", runs.columns([tuner, *controls]) if controls else None, stats.win_rate)
    enter("median_pass_ratio_to_mezo_loss", stats.pass_ratios(runs, tuner, mezo)[..., None], stats.median_ratio)
    enter("mean_loss_difference_to_mezo", runs.columns([tuner, mezo]), stats.mean_difference)
    counted = [cell for cell in runs.cells if evidence.accuracy_status(tuner, cell) == "counted"]
    points = runs.columns([tuner, mezo], "accuracy", counted) * 100 if counted else None
    enter("mean_accuracy_gain", points, stats.mean_difference)
    enter("mean_accuracy_gain_all_pairs", runs.columns([tuner, mezo], "accuracy") * 100, stats.mean_difference)
    each = {label: runs.columns([tuner, label]) for label in controls}
    rates = {label: stats.estimate(table, stats.win_rate) for label, table in each.items()}
    figures |= {"win_rate_over_each_control": rates, "lowest_win_rate_over_a_control": min(rates.values(), default=None)}
    ends = {label: list(stats.interval(table, stats.win_rate)) for label, table in each.items()}
    intervals["win_rate_over_each_control"] = ends
    return figures | {"pairs_in_accuracy_gain": len(counted), "intervals": intervals}


def pair_rows(evidence: Evidence, tuner: str) -> list[dict[str, Any]]:
    """Pair by pair, the values that the figures of a tuner summarize."""
    ratios = stats.pass_ratios(evidence.runs, tuner, evidence.mezo)

    def means(quantity: str, cell: Cell) -> dict[str, float]:
        return {label: float(evidence.runs.values(label, quantity, [cell]).mean()) for label in evidence.roles}

    return [
        {
            "setting": cell.setting,
            "task": cell.task,
            "majority_share": evidence.majority[cell],
            "accuracy": evidence.accuracy_status(tuner, cell),
            "mean_train_loss": means("train_loss", cell),
            "mean_dev_loss": means("dev_loss", cell),
            "mean_accuracy": means("accuracy", cell),
            "pass_ratio_to_mezo_loss": [float(ratio) for ratio in row],
        }
        for cell, row in zip(evidence.runs.cells, ratios, strict=True)
    ]


def write_verdict(
    folder: RunDirectory,
    config: MetaEvaluateConfig,
    places: Sequence[Place],
    missing: Mapping[str, Mapping[str, str]],
    majority: Mapping[Cell, float],
    chosen: Chosen,
    done: Sequence[Run],
) -> dict[str, Any]:
    """Compute the verdict, write it with figures and page, and print its tables; what :data:`RESULT` holds.

    ``missing``: setting -> control -> why it was not built.
    """
    evidence, judged = Evidence.of(places, done, majority), config.judged_contender.label
    tuners, shares = evidence.labels(spec.TUNER), stats.win_shares(evidence.runs.losses)
    verdict: dict[str, Any] = {
        "judged": judged,
        **judge(evidence, judged),
        "by_setting": {place.setting.name: judge(Evidence.of([place], done, majority), judged) for place in places},
        "by_tuner": {label: judge(evidence, label) for label in tuners},
        "departures": departures(config, chosen),
        "protocol": {
            "document": "docs/protocol.md",
            "config": asdict(config),
            "controls_left_out": missing,
            "chosen": [
                {"setting": cell.setting, "task": cell.task, "contender": label, **point, "at_edge": stats.at_edge(point, grid)}
                for (cell, label), (point, grid) in chosen.items()
            ],
        },
        "win_matrix": {"contenders": list(evidence.roles), "row_beats_column": shares},
        "pairs": {label: pair_rows(evidence, label) for label in tuners},
        "runs": [record(run) for run in done],
        "environment": environment(),
    }
    path = folder.path
    write_json_lines(path / RESULT, verdict)
    found = [pairs_table(name, part, chosen) for name, part in evidence.runs.places.items()]
    found.append(headline_table(verdict["by_tuner"]))
    pictures = {"Share of pairs won": draw_matrix(path / "wins.png", list(evidence.roles), shares)}
    for name, part in evidence.runs.places.items():
        panels = {cell.task: mean_curves(part, cell)["passes"] for cell in part.cells}
        target = path / f"losses-{part.cells[0].setting}.png"
        pictures[f"{name}: loss"] = draw_curves(target, panels, list(evidence.roles), "forward passes")
    notes = [f"not the protocol: {line}" for line in verdict["departures"]]
    tables.write_page(path / "index.html", f"{judged} by the protocol", notes, found, pictures, config.recorded)
    tables.print_tables(found)
    print("\n".join(notes))
    folder.finish({name: value for name, value in verdict.items() if name not in ("runs", "pairs", "environment")})
    print(f"verdict: {path / RESULT}")
    return verdict


def departures(config: MetaEvaluateConfig, chosen: Chosen) -> list[str]:
    """Where an evaluation asks less than the protocol does, whose numbers are the configuration's defaults."""
    left_out = [name for name in spec.CONTROLS if name not in config.controls]
    found = [f"no controls {', '.join(left_out)}"] if left_out else []
    if config.seconds is not None:
        found.append(f"{config.seconds:g} seconds of training instead of equal passes")
    asked = {"passes": min(setting.passes or config.passes for setting in config.settings)}
    asked |= {name: getattr(config, name) for name in ("train_size", "dev_size", "test_size")}
    whole = MetaEvaluateConfig()
    found += [f"{n} {asked[n]} instead of {getattr(whole, n)}" for n in asked if asked[n] < getattr(whole, n)]
    if config.seeds < stats.SEEDS:
        found.append(f"{config.seeds} seeds instead of {stats.SEEDS}")
    if not any(contender.role == spec.BASELINE_DIZO for contender in config.contenders):
        found.append("no DiZO")
    untuned = {(cell.setting, label) for (cell, label), (_, grid) in chosen.items() if len(grid) < 2}
    return found + [f"setting {name!r}: one learning rate for {label!r}, not tuned" for name, label in sorted(untuned)]


def record(run: Run) -> dict[str, Any]:
    """A run as a row of ``runs``: everything but its curve, which its folder holds."""
    skipped = ("cell", "curve", "point", "refused")
    plain = {name: value for name, value in asdict(run).items() if name not in skipped}
    return {**run.cell._asdict(), **plain, "size": stats.point_size(run.point), **run.point}


def write_json_lines(target: Path, verdict: Mapping[str, Any]) -> Path:
    """Write a verdict as strict JSON, whole, a line per run; numbers that are not finite as null."""
    plain = finite(verdict)
    rows = ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in plain.pop("runs"))
    text = json.dumps(plain, indent=1, allow_nan=False)[:-2] + f',\n "runs": [\n{rows}\n ]\n}}\n'
    return write_whole(target, lambda path: path.write_text(text))


def pairs_table(title: str, runs: RunTable, chosen: Chosen) -> Table:
    """A row per pair and contender of a setting."""
    rows = []
    for cell in runs.cells:
        for label in runs.labels:
            texts = [cell.task, label, tables.point_text(chosen[cell, label][0])]
            for quantity in ("train_loss", "dev_loss", "accuracy"):
                texts.append(spread(runs.values(label, quantity, [cell])[0].tolist()))
            rows.append([Text(text) for text in (*texts, f"{runs.values(label, 'passes', [cell]).mean():.0f}")])
    columns = ["task", "contender", "step size", "train loss", "dev loss", "accuracy", "passes"]
    return Table(f"{title.split(',')[0]}: mean ± standard deviation over seeds", columns, rows)


HEADLINES = {
    "win_rate_over_mezo": "lower training loss than MeZO",
    "win_rate_over_dizo": "lower training loss than DiZO",
    "win_rate_over_controls": "lower training loss than a control",
    "lowest_win_rate_over_a_control": "than the control hardest to beat",
    "median_pass_ratio_to_mezo_loss": "passes to MeZO's loss, over MeZO's",
    "mean_loss_difference_to_mezo": "training loss less MeZO's (nats)",
    "mean_accuracy_gain": "accuracy gain over MeZO (points)",
}


def headline_table(tuners: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of each tuner with their intervals."""
    rows = []
    for name, headline in HEADLINES.items():
        rows.append([Text(headline)])
        for found in tuners.values():
            value, ends = found[name], found["intervals"].get(name)
            around = "" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
            rows[-1].append(Text("-" if value is None else f"{value:.3g}{around}"))
    return Table("tuners, with 95 % intervals over pairs and seeds", ["over all pairs", *tuners], rows)
