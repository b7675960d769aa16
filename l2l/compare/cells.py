"""A cell of a comparison, the runs that fill it, and what is read back of them."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from l2l.compare.compare_config import CompareConfig, MethodEntry, SchemeEntry
from l2l.compare.config import Setting
from l2l.compare.entries import Entry
from l2l.compare.jobs import Job, finished
from l2l.compare.protocol import Point, Run, point_size
from l2l.compare.trials import Trial, digest, located, outcome, run_tolerantly


class Cell(NamedTuple):
    """Where methods meet: a model, a tuning scheme and a task."""

    setting: str
    scheme: str
    task: str


@dataclass(frozen=True)
class Place:
    """A setting under a tuning scheme, with everybody who takes part there."""

    setting: Setting
    scheme: SchemeEntry
    entries: Mapping[str, tuple[MethodEntry, Entry]]
    """Label -> the entry as it was given, and with its tuner as it is now."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Label -> why it does not take part here."""

    @property
    def cells(self) -> list[Cell]:
        """One for each task."""
        return [Cell(self.setting.name, self.scheme.name, task) for task in self.setting.tasks]


@dataclass(frozen=True)
class Result:
    """A run of the comparison: what the protocol sees of it, where it belongs, and what it took."""

    cell: Cell
    label: str
    run: Run
    peak_bytes: int | None = None
    """Most memory that its process had while it trained."""
    refused: str = ""
    """Why it did not run at all."""

    @property
    def status(self) -> str:
        """``ok``, ``diverged`` or ``refused``."""
        return "refused" if self.refused else "diverged" if self.run.diverged else "ok"


def cell_options(config: CompareConfig, setting: Setting, scheme: SchemeEntry) -> dict[str, Any]:
    """What all runs of a setting under a scheme have in common."""
    passes = setting.passes or config.passes
    return {
        "model": located(setting.model, config.root),
        "data_dir": None if setting.data_dir is None else str(Path(config.root) / setting.data_dir),
        "max_length": setting.max_length,
        "batch_size": setting.batch_size,
        "train_size": config.train_size,
        "dev_size": config.dev_size,
        "test_size": config.test_size,
        "steps": passes,  # a step takes one pass or more: the passes end the run
        "max_passes": passes,
        "eval_every": max(1, passes // 2 // config.evaluations),
        "checkpoint_every": passes,
        "scheme": scheme.name,
        **scheme.options,
    }


def trial_of(
    config: CompareConfig, place: Place, label: str, task: str, point: Point, seed: int, tuning: bool, runs: Path
) -> Trial:
    """The run of a method on a task, in a folder that everything which decides it gives its name."""
    _, entry = place.entries[label]
    options = cell_options(config, place.setting, place.scheme) | entry.options
    options |= {"method_args": entry.method_args, **point}
    job = Job(label, task, entry.method, options.pop("lr"), seed, "", entry.tuners[task], options)
    words = (Path(task).stem, place.scheme.name, re.sub(r"[^\w.+-]", "_", entry.method), f"s{seed}")
    name = "-".join((*words, digest(job, **_source(entry.method))))
    out = str(runs / place.setting.name / name)
    return Trial(place.setting, entry, task, point, seed, tuning, replace(job, out=out))


def _source(method: str) -> dict[str, str]:
    """Hash of the files that define methods elsewhere, which no version tells apart: edited, it is another method."""
    paths = [inspect.getfile(import_module(part)) for part in method.split("+") if "." in part]
    if not paths:
        return {}
    content = b"".join(Path(path).read_bytes() for path in paths)
    return {"source": hashlib.blake2b(content, digest_size=8).hexdigest()}


def run_cell(job: Job) -> dict[str, Any]:
    """Run a job: one that diverges is bad, one that is refused says why, and the others go on."""
    try:
        return run_tolerantly(job)
    except (ValueError, FileNotFoundError) as error:
        return {"final_loss": float("inf"), "refused": " ".join(str(error).split())}


def result_of(trial: Trial, refused: Mapping[str, str]) -> Result:
    """What a run ended with.

    Args:
        refused: folder of a run -> why it was refused.

    Raises:
        ValueError: it is not done.
    """
    cell = Cell(trial.setting.name, trial.job.options["scheme"], trial.task)
    if trial.job.out in refused:
        same = (trial.setting.name, trial.setting.model, trial.task, trial.entry.label, trial.entry.role, trial.seed)
        return Result(cell, trial.job.label, Run(*same, trial.tuning, trial.point), None, refused[trial.job.out])
    summary = finished(trial.job)
    peak = summary["measured"]["peak_bytes"] if summary else None
    return Result(cell, trial.job.label, outcome(trial, curve=False), peak)


def record(result: Result, place: Place) -> dict[str, Any]:
    """The result as a row of ``results.csv``: plain values, None where there is none."""
    run, (given, entry) = result.run, place.entries[result.label]
    ok = result.status == "ok"
    measured = ("passes", "steps", "seconds", "initial_loss", "train_loss", "dev_loss", "test_loss", "accuracy")
    return {
        "setting": run.setting,
        "model": run.model,
        "scheme": result.cell.scheme,
        "task": run.task,
        "label": result.label,
        "method": given.method,
        "tuner": entry.tuners[run.task],
        "seed": run.seed,
        "tuning": run.tuning,
        "lr": None if run.point["lr"] == "auto" else float(run.point["lr"]),
        "beta": float(run.point["beta"]) if run.point["lr"] == "auto" else None,
        "step_size": point_size(run.point),
        "status": result.status,
        **{name: getattr(run, name) if ok else None for name in (*measured, "best_dev_loss", "best_accuracy")},
        "peak_bytes": result.peak_bytes,
        "reason": result.refused,
        "folder": run.folder,
    }
