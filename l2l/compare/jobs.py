"""Fine-tuning runs side by side: each a process's work, each a plain record at the end."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, TypeAlias


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
    from l2l.finetune.run import fine_tune

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
