"""From an entry, a task, a point and a seed to a run on disk, and back to what the protocol sees of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from l2l.compare.config import MetaEvaluateConfig, Setting
from l2l.compare.curves import Curve
from l2l.compare.entries import Entry
from l2l.compare.jobs import Job, finished, run_job
from l2l.compare.protocol import Point, Run
from l2l.finetune import runlog
from l2l.finetune.config import FineTuneConfig
from l2l.report.files import write_json
from l2l.report.metrics import read_metrics
from l2l.report.rundir import METRICS


@dataclass(frozen=True)
class Trial:
    """A run to do."""

    setting: Setting
    entry: Entry
    task: str
    point: Point
    seed: int
    tuning: bool
    job: Job


def trial(
    config: MetaEvaluateConfig,
    setting: Setting,
    entry: Entry,
    task: str,
    point: Point,
    seed: int,
    tuning: bool,
    runs: Path,
) -> Trial:
    """The run of an entry on a task, in a folder that everything which decides it gives its name.

    So contenders that come to the same run share it, and so do evaluations with a common ``runs``.
    """
    options: dict[str, Any] = (
        shared_options(config, setting) | entry.options | {"method_args": entry.method_args} | dict(point)
    )
    lr, tuner = options.pop("lr"), entry.tuners[task]
    job = Job(entry.label, task, entry.method, lr, seed, "", tuner, options)
    out = str(runs / setting.name / f"{Path(task).stem}-{entry.method}-s{seed}-{digest(job)}")
    return Trial(setting, entry, task, point, seed, tuning, replace(job, out=out))


def digest(job: Job, **more: Any) -> str:
    """Hash of everything that decides a run, wherever it is kept.

    Args:
        more: what decides it beside the job, by name.
    """
    decided = {"l2l": version("l2l"), "torch": version("torch"), "method": job.method, "tuner": job.tuner, **more}
    decided |= {"lr": job.lr, "task": job.task, "seed": job.seed, **_unlike_defaults(job.options)}
    return hashlib.blake2b(json.dumps(decided, sort_keys=True).encode(), digest_size=6).hexdigest()


def _unlike_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is told that it would not do anyway: to say ``schedule: constant`` is to say nothing."""
    defaults = FineTuneConfig()
    return {name: value for name, value in options.items() if value != getattr(defaults, name)}


def shared_options(config: MetaEvaluateConfig, setting: Setting) -> dict[str, Any]:
    """What all runs of a setting have in common."""
    passes = setting.passes or config.passes
    steps = max(1, passes // 2)
    return {
        "model": located(setting.model, config.root),
        "data_dir": None if setting.data_dir is None else str(Path(config.root) / setting.data_dir),
        "max_length": setting.max_length,
        "batch_size": setting.batch_size,
        "train_size": config.train_size,
        "dev_size": config.dev_size,
        "test_size": config.test_size,
        "steps": steps,
        "max_passes": passes,
        "eval_every": max(1, steps // config.evaluations),
        "checkpoint_every": steps,
    }


def located(name: str, root: str) -> str:
    """A directory below ``root`` where there is one of that name; else the name as it stands."""
    below = Path(root) / name
    return str(below) if below.is_dir() else name


def run_tolerantly(job: Job) -> dict[str, Any]:
    """Run a job; where it diverges, note that beside its folder: such a learning rate is a bad one, not an error."""
    note = _note(job)
    if not note.is_file():
        try:
            return run_job(job)
        except FloatingPointError as error:
            write_json(note, {"diverged": str(error)})
    return {"final_loss": float("inf")}


def is_done(job: Job) -> bool:
    """Whether the run was done before, to whatever end."""
    return _note(job).is_file() or finished(job) is not None


def _note(job: Job) -> Path:
    return Path(f"{job.out}.diverged.json")


def outcome(done: Trial, curve: bool) -> Run:
    """What the protocol sees of a run that is done.

    Args:
        curve: read the losses of all steps too.

    Raises:
        ValueError: it is not done.
    """
    job = done.job
    same = (done.setting.name, done.setting.model, done.task, done.entry.label, done.entry.role, done.seed, done.tuning)
    if _note(job).is_file():
        return Run(*same, done.point, diverged=True, folder=job.out)
    summary = finished(job)
    if summary is None:
        raise ValueError(f"the run in {job.out} is not done: run the evaluation again")
    return Run(
        *same,
        done.point,
        passes=summary["passes"],
        steps=summary["steps"],
        seconds=summary["seconds"],
        initial_loss=summary["initial_loss"],
        train_loss=summary["final_loss"],
        dev_loss=last_dev_loss(Path(job.out)),
        test_loss=summary["last"]["test"]["loss"],
        accuracy=summary["accuracy"],
        best_dev_loss=summary["best"]["dev"]["loss"],
        best_accuracy=summary["best"]["test"]["value"],
        folder=job.out,
        curve=step_curve(Path(job.out)) if curve else (),
    )


def last_dev_loss(folder: Path) -> float:
    """Dev loss with the weights of the last step: every run ends with an evaluation."""
    return float([row["dev_loss"] for row in read_metrics(folder / METRICS) if row["dev_loss"]][-1])


def step_curve(folder: Path) -> Curve:
    """(passes spent, mean of the losses seen along the step's directions), step by step."""
    _, steps = runlog.read_run_log(folder / runlog.NAME)
    spent = accumulate(step["passes"] for step in steps)
    return [(float(passes), _seen(step)) for passes, step in zip(spent, steps, strict=True)]


def _seen(step: Mapping[str, Any]) -> float:
    losses = [loss for _, *sides in step["draws"] for loss in sides if loss is not None]
    return sum(losses) / len(losses) if losses else float(step["loss"])
