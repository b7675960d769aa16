"""Fine-tuning runs side by side: each a process's work, each a plain record at the end.

From an entry, a task, a point and a seed to a run on disk, and back to what the protocol sees of it.

A cell of a comparison, the runs that fill it, and what is read back of them.

Who runs the jobs of a comparison: processes of this machine, or a Ray cluster. Jobs go in, records come out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from itertools import accumulate
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, NamedTuple, TypeAlias, final

from l2l.experiments.spec import (
    CompareConfig,
    Entry,
    ExecutorName,
    MetaEvaluateConfig,
    MethodEntry,
    SchemeEntry,
    Setting,
)
from l2l.experiments.stats import Curve, Point, Run, point_size
from l2l.report.files import write_json
from l2l.report.run_directory import METRICS, read_metrics
from l2l.train import runlog
from l2l.train.config import FineTuneConfig


@dataclass(frozen=True)
class Job:
    """One run."""

    label: str
    """What the table calls the method."""
    task: str
    method: str
    lr: float | Literal["auto"]
    seed: int
    out: str
    tuner: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the fine-tuning configuration."""


def run_job(job: Job) -> dict[str, Any]:
    """Run one job; its record."""
    from l2l.train.trainer import fine_tune

    summary = finished(job)
    if summary is None:
        summary = fine_tune(out=job.out, overwrite=True, progress=False, save_model=False, **_given(job)).summary
    return {
        "task": job.task,
        "method": job.label,
        "lr": job.lr,
        "seed": job.seed,
        "steps": summary["steps"],
        "passes": summary["passes"],
        "seconds": summary["seconds"],
        "final_loss": summary["final_loss"],
        "accuracy": summary["accuracy"],
        "dev_loss": summary["best"]["dev"]["loss"],
        "test_loss": summary["last"]["test"]["loss"],
        "run": job.out,
    }


Work: TypeAlias = Callable[[Job], dict[str, Any]]
"""Runs a job in a process of its own; its record."""


def _given(job: Job) -> dict[str, Any]:
    same = {"task": job.task, "method": job.method, "tuner": job.tuner, "lr": job.lr, "seed": job.seed}
    return same | job.options


def finished(job: Job) -> dict[str, Any] | None:
    """The summary of the same run where it was done before an interruption; None where it was not."""
    path = Path(job.out) / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else None
    return summary if summary and _given(job).items() <= summary["config"].items() else None


_leaving = Event()
"""Set in a process that was interrupted: jobs that it had already fetched do not begin."""


def _begin_process() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, _leave)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes; what they still wrote would meet those that continue."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _leave(*_: Any) -> None:
    """Ctrl-C ends the job without a traceback; the parent says what happened."""
    _leaving.set()
    sys.exit(130)


def _work(job: Job, work: Work) -> dict[str, Any]:
    if _leaving.is_set():
        sys.exit(130)
    return work(job)


def run_jobs(
    jobs: Sequence[Job], processes: int, after_each: Callable[[dict[str, Any]], None], work: Work = run_job
) -> list[dict[str, Any]]:
    """Run jobs over processes of one thread each; records in the order of the jobs.

    Args:
        after_each: called in this process with each record as it arrives.
        work: what runs a job; a function of a module.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    records: list[dict[str, Any] | None] = [None] * len(jobs)
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin_process) as pool:
        futures = {pool.submit(_work, job, work): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                record = future.result()
                records[futures[future]] = record
                after_each(record)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [record for record in records if record is not None]


def run_folder(root: Path, *words: object) -> str:
    """Directory of a run."""
    return str(root / "runs" / "-".join(str(word) for word in words))


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
    losses = [loss for _, *sides in step["directions"] for loss in sides if loss is not None]
    return sum(losses) / len(losses) if losses else float(step["loss"])


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
        "step_fraction": float(run.point["step_fraction"]) if run.point["lr"] == "auto" else None,
        "step_size": point_size(run.point),
        "status": result.status,
        **{name: getattr(run, name) if ok else None for name in (*measured, "best_dev_loss", "best_accuracy")},
        "peak_bytes": result.peak_bytes,
        "reason": result.refused,
        "folder": run.folder,
    }


Record: TypeAlias = dict[str, Any]


class Executor(ABC):
    """Abstract executor."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], work: Work, after_each: Callable[[Record], None]) -> list[Record]:
        """Run jobs; their records in the order of the jobs.

        Args:
            work: runs a job, in another process; a function of a module.
            after_each: called in this process with each record as it arrives.
        """


@final
@dataclass(frozen=True)
class Local(Executor):
    """Processes of this machine, one thread each.

    Its runs raise ValueError where a process was killed.
    """

    processes: int

    def run(self, jobs: Sequence[Job], work: Work, after_each: Callable[[Record], None]) -> list[Record]:
        try:
            return run_jobs(jobs, self.processes, after_each, work)
        except BrokenProcessPool as error:
            raise ValueError(
                "a process ended in the middle of a run, for want of memory perhaps: the same command continues; with fewer "
                "--processes each has more"
            ) from error


@final
@dataclass(frozen=True)
class Ray(Executor):
    """Tasks of a Ray cluster, a processor each: the one that ``RAY_ADDRESS`` names, else one on this machine.

    Its machines see the same files under the same paths, and have the same package.

    Raises:
        ValueError: Ray is not installed.
    """

    processes: int
    """Most tasks at a time."""

    def __post_init__(self) -> None:
        _ray()

    def run(self, jobs: Sequence[Job], work: Work, after_each: Callable[[Record], None]) -> list[Record]:
        ray = _ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        remote = ray.remote(num_cpus=1)(_in_one_thread)
        records: dict[int, Record] = {}
        waiting, running = list(range(len(jobs))), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    number = waiting.pop(0)
                    running[remote.remote(jobs[number], work)] = number
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                number = running.pop(ready)
                records[number] = ray.get(ready)
                after_each(records[number])
        finally:
            for unfinished in running:
                ray.cancel(unfinished)
        return [records[number] for number in range(len(jobs))]


def _in_one_thread(job: Job, work: Work) -> Record:
    import torch

    torch.set_num_threads(1)
    return work(job)


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise ValueError(
            "executor: ray needs Ray, which is not installed: pip install 'l2l[ray]', or use executor: local"
        ) from error


def executor_of(name: ExecutorName, processes: int) -> Executor:
    """The executor of that name.

    Raises:
        ValueError: it needs a package that is not installed.
    """
    return Ray(processes) if name == "ray" else Local(processes)
