"""A population over the workers of a Ray cluster: actors evaluate members and send losses; this process leads, and writes.

Weights travel to nobody. Every worker loads the model by itself and replays the run log; from then on it gets the records of
the steps that were taken, some 20 bytes and the losses each, takes these steps again, and evaluates its members of the next.
So whoever is lost costs the step that it was in its members, which the step's record names, and its replacement is where the
others are as soon as it has replayed the log. The members of a step are dealt to the workers that are there then: they join and
leave between steps. What a step does with what has come is that of ranks (:mod:`l2l.train.several`), and so are log and replay.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch

from l2l.estimators import ClosureValue
from l2l.optim import ZOOptimizer
from l2l.parallel.data import checksum, raise_where_different
from l2l.parallel.population import deal, evaluate_points, members_of, plan_points
from l2l.parallel.values import pack, unpack
from l2l.train import cluster
from l2l.train.config import CompleteConfig
from l2l.train.inputs import Closures
from l2l.train.runlog import StepRecord, parse_log, parse_record, take_again
from l2l.train.several import LOG, Lead, check_same, due, prefix_in_memory, step_by_answers, timeout_of

if TYPE_CHECKING:
    from l2l.train.trainer import RunContext

logger = logging.getLogger(__name__)


def check_named(**inputs: object) -> None:
    """Raise ValueError, naming the first of the inputs of a run that is an object: workers load theirs by name."""
    for name, value in inputs.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{name} is an object, and the workers of executor='ray' load theirs on their own machines: give its name or "
                "directory, or leave executor out"
            )


@final
class Worker:
    """In a process of the cluster: a copy of the run that follows, and evaluates members."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._context: RunContext | None = None
        self._before: StepRecord | None = None
        self._epsilon: float | None = None

    def join(self, config: CompleteConfig, folder: str, threads: int, name: str, log: bytes) -> None:
        """Load what the run reads, and replay its log so far.

        Args:
            folder: the working directory.
            threads: of a pass, and of noise.

        Raises:
            ValueError, FileNotFoundError: this machine lacks the directory, the model or the data; or it runs something else
                than the log's writer, or its steps come out otherwise.
        """
        from l2l.train.trainer import prepare_fine_tuning  # which imports this module

        cluster.enter(folder)
        torch.set_num_threads(threads)
        found, context = parse_log(log, LOG), prepare_fine_tuning(config)
        check_same(context, found, name)
        self._held.enter_context(prefix_in_memory(context, name))
        self._held.enter_context(context.optimizer.theta.fused_steps())
        self._context, self._epsilon = context, found.header["epsilon"]
        for record in found.steps:
            self._take(context.optimizer, record)

    def evaluate(self, records: Sequence[bytes], indices: Sequence[int]) -> tuple[bytes, bytes]:
        """Take the steps of these records, the next ones of this copy, and evaluate points of the step after: their values, and
        the checksum of the weights where these are to be compared."""
        assert self._context is not None, "a worker joins first"
        optimizer, every = self._context.optimizer, self._context.config.checksum_every
        for content in records:
            self._take(optimizer, parse_record(content, self._before, self._epsilon))
        own = checksum(optimizer) if due(optimizer.steps_done, every) else b""
        points, closure = plan_points(optimizer), self._context.closures.at(optimizer.steps_done)
        return pack(evaluate_points(closure, optimizer.theta, [points[i] for i in indices])), own

    def _take(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        take_again(optimizer, record, optimizer.steps_done, population=True)
        self._before = record


@dataclass
class Hired:
    """A worker as its leader sees it."""

    number: int
    """From 1 on, in the order of hiring."""
    actor: Any
    task: Any
    """What it is at work on: joining at first; None: nothing."""
    known: int
    """Records that it has been sent."""


@final
class RayLead(Lead):
    """Hires the workers, deals each step to those that are there, and replaces those that are lost.

    Raises:
        ValueError: see :func:`l2l.train.cluster.connect`.
    """

    def __init__(self, config: CompleteConfig, device: torch.device) -> None:
        super().__init__(config)
        self._threads, self._timeout, self._device = torch.get_num_threads(), timeout_of(config), device
        self._ray = cluster.connect(config.ray_address, config.workers * self._threads)
        self._config = replace(config, progress=False)
        self._log = b""
        self._records: list[bytes] = []
        self.workers: list[Hired] = []
        self._hired = self._lost = self._left_out = self._steps = 0
        self._sent = {"leader": 0, "workers": 0}

    def tell(self, content: bytes) -> None:
        if self._log:
            self._records.append(content)
            return
        self._log = content
        for _ in range(self._config.workers):
            self._hire()

    def _hire(self) -> None:
        self._hired += 1
        reserved = cluster.resources(self._config.device, self._threads)
        actor = self._ray.remote(Worker).options(**reserved, max_restarts=0).remote()
        log = self._log + b"".join(self._records)
        task = actor.join.remote(self._config, os.getcwd(), self._threads, f"worker {self._hired}", log)
        self.workers.append(Hired(self._hired, actor, task, len(self._records)))

    def step(self, optimizer: ZOOptimizer, closures: Closures, lr: float, restored: bool, own: bytes) -> None:
        step, points = optimizer.steps_done, plan_points(optimizer)
        values: dict[int, ClosureValue] = {}
        present = self._present(step)
        asked = [(worker, part) for worker, part in zip(present, deal(points, len(present)), strict=True) if part]
        for worker, part in asked:
            news = self._records[worker.known :]
            worker.task, worker.known = worker.actor.evaluate.remote(news, part), len(self._records)
            self._sent["leader"] += sum(map(len, news))
        done = self._done([worker for worker, _ in asked], len(asked), self._timeout)
        for worker, part in asked:
            answer, why = self._answer(worker) if worker in done else (None, f"no answer for {self._timeout:g} s")
            if answer is None:
                members = members_of([points[i] for i in part])
                logger.warning("step %d goes on without directions %s of worker %d: %s", step, members, worker.number, why)
                continue
            content, theirs = answer
            self._sent["workers"] += len(content)
            if own:
                raise_where_different([own, *[b""] * (worker.number - 1), theirs], step)
            values |= dict(zip(part, unpack(content, self._device), strict=True))
        self._left_out += len(step_by_answers(optimizer, closures.at(step), points, values))
        self._steps += 1

    def _present(self, step: int) -> list[Hired]:
        """The workers that have nothing to do. In the beginning all of them are waited for, later one where there is none.

        Raises:
            ValueError: nobody has come in time.
        """
        busy = [worker for worker in self.workers if worker.task is not None]
        nobody = len(busy) == len(self.workers)
        count = 1 if nobody and self._steps else len(busy)
        for worker in self._done(busy, count, self._timeout if nobody else 0.0):
            answer, why = self._answer(worker)
            logger.warning("step %d: worker %d %s", step, worker.number, why if answer is None else "takes part from here on")
        present = [worker for worker in self.workers if worker.task is None]
        if not present:
            raise ValueError(
                f"no worker of the Ray cluster is there after {self._timeout:g} s; each reserves "
                f"{cluster.resources(self._config.device, self._threads)} of a machine (`ray status` tells what is free), and "
                "loads the model: where that takes longer, give it more time with --rank_timeout; the same command continues"
            )
        return present

    def _done(self, workers: Sequence[Hired], count: int, seconds: float) -> list[Hired]:
        """Those that have ended what they were at, once ``count`` have, or ``seconds`` are over."""
        if not workers:
            return []
        ready, _ = self._ray.wait([worker.task for worker in workers], num_returns=count, timeout=seconds)
        return [worker for worker in workers if worker.task in ready]

    def _answer(self, worker: Hired) -> tuple[Any, str]:
        """What a worker has given; None, and why, where it is lost, and then another one is hired."""
        try:
            found = cluster.result(self._ray, worker.task)
        except cluster.Lost as error:
            self.workers.remove(worker)
            self._lost += 1
            self._hire()
            return None, f"it is lost ({error})"
        worker.task = None
        return found or (), ""

    def end(self, steps: int) -> dict[str, Any]:
        for worker in self.workers:
            self._ray.kill(worker.actor)
        sent = {name: {"per_step": size / max(steps, 1)} for name, size in self._sent.items()}
        return {"workers": self._config.workers, "lost": self._lost, "left_out": self._left_out, "sent": sent}
