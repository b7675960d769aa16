"""Who runs the jobs of a comparison: processes of this machine, or a Ray cluster. Jobs go in, records come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias, final

from l2l.compare.compare_config import ExecutorName
from l2l.compare.jobs import Job, Work, run_jobs

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
