"""Fine-tuning runs side by side: each a process's work, each a plain record at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run."""

    label: str
    """What the table calls the method."""
    task: str
    method: str
    lr: float
    seed: int
    out: str
    tuner: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the fine-tuning configuration."""


def run_job(job: Job) -> dict[str, Any]:
    """Run one job; its record."""
    from l2l.finetune.run import fine_tune

    summary = fine_tune(
        task=job.task,
        method=job.method,
        tuner=job.tuner,
        lr=job.lr,
        seed=job.seed,
        out=job.out,
        overwrite=True,
        progress=False,
        save_model=False,
        **job.options,
    ).summary
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


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_jobs(jobs: Sequence[Job], processes: int, after_each: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Run jobs over processes of one thread each; records in the order of the jobs.

    Args:
        after_each: called in this process with each record as it arrives.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    records: list[dict[str, Any] | None] = [None] * len(jobs)
    with ProcessPoolExecutor(processes, get_context("spawn"), _one_thread) as pool:
        futures = {pool.submit(run_job, job): number for number, job in enumerate(jobs)}
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
