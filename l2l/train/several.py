"""A run of several processes: rank 0 leads, writes and evaluates; the others follow, and write nothing.

All begin with the same weights, which each loads by itself, and with the run log, which rank 0 tells the others as it grows.
Whoever joins, late or again after it was killed, replays the log, and so has the weights of the present step.

- ``data`` (:mod:`l2l.parallel.data`): rank 0 tells the learning rate of each step; all evaluate their pieces of each batch.
- ``population`` (:mod:`l2l.parallel.population`): rank 0 says who is there, collects what they have evaluated, leaves out who
  has not answered in time, and tells the step's record, by which the others take the step. Workers join and leave at any step.
"""

import json
import logging
import math
import os
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch

from l2l.estimators import Closure, ClosureValue
from l2l.methods.base import FirstOrder
from l2l.optim import ZOOptimizer
from l2l.parallel.data import DataParallel, checksum, raise_where_different
from l2l.parallel.population import LEAST, Answers, Point, deal, evaluate_points, members_of, plan_points
from l2l.parallel.ranks import FAILED, RankError, Ranks, RunFinished, ranks_of_environment
from l2l.parallel.values import pack, unpack
from l2l.report.run_directory import stop_requests
from l2l.train.baselines import baseline_names
from l2l.train.config import CompleteConfig
from l2l.train.inputs import Closures, weights_digests
from l2l.train.runlog import (
    POPULATION,
    Log,
    StepRecord,
    header_differences,
    parse_log,
    parse_record,
    run_header,
    take_again,
    why_not,
)

if TYPE_CHECKING:
    from l2l.train.trainer import RunContext

logger = logging.getLogger(__name__)

DATA_TIMEOUT, POPULATION_TIMEOUT = 1800.0, 60.0
"""Seconds that a rank is waited for. A batch needs all of them; a population goes on without."""
LOG, HELLO, OUT = "log", "hello", "out"
"""Keys: the run log in the beginning; how many workers have asked to take part in a population; one that was left out."""
BEGIN, DEAL, RECORD, SUM = "b", "d", "r", "c"
"""Keys of a step: what data-parallel ranks begin it with; who takes part in a population's; its record; a worker's checksum.
Records stay, so that a rank that joins, or is far behind, takes one after the other."""
_BEGIN = struct.Struct("<?d")
"""Whether the weights were restored before a step, and its learning rate."""


def enlist(config: CompleteConfig) -> tuple[Ranks | None, CompleteConfig]:
    """The ranks of a run, None where there is one process, and the configuration with what follows from them: each rank has a
    GPU of its own, batches are split, and populations are perturbed functionally.

    Raises:
        ValueError: what the configuration asks for is of one process; the message says how to go on.
    """
    on_ray = config.executor == "ray"
    if on_ray and config.parallel != POPULATION:
        raise ValueError(
            f"executor='ray' shares the directions of a step, and parallel is {config.parallel!r}: use --parallel population "
            "with --num_directions, or torchrun, which starts the ranks of --parallel data"
        )
    ranks = None if on_ray else ranks_of_environment(timeout_of(config))
    if ranks is None and not on_ray:
        if config.parallel == POPULATION:
            raise ValueError(
                "parallel='population' needs several processes, and this is one: start it with torchrun --nproc_per_node 2 -m "
                "l2l fine-tune ..., or on a cluster with --executor ray, or leave parallel out and use --perturb functional, "
                "which gives the same weights"
            )
        return None, config
    mode = config.parallel or "data"
    if ranks is not None and ranks.rank and mode == POPULATION:
        ranks.timeout = max(ranks.timeout, DATA_TIMEOUT)  # rank 0 waits for the late, and evaluates and saves between steps
    if config.method in baseline_names():
        raise ValueError(f"method {config.method!r} takes no steps that ranks could share: run it in one process")
    if config.stream_layers or config.prefix_cache == "disk" or config.loop == "lightning":
        name = "stream_layers" if config.stream_layers else "loop" if config.loop == "lightning" else "prefix_cache"
        raise ValueError(f"{name}={getattr(config, name)!r} is of one process, and here are several: leave it out")
    functional = {"perturb": "functional"} if mode == POPULATION and config.perturb == "auto" else {}
    if ranks is None:
        return None, replace(config, **functional)
    changes: dict[str, Any] = {"parallel": mode, "progress": config.progress and ranks.rank == 0, **functional}
    if config.device == "cuda" and "LOCAL_RANK" in os.environ:
        changes["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    if mode == "data" and config.micro_batch is None:
        changes["micro_batch"] = math.ceil(config.batch_size / ranks.size)
    return ranks, replace(config, **changes)


def timeout_of(config: CompleteConfig) -> float:
    """Seconds that another process is waited for; in a population, by rank 0."""
    return config.rank_timeout or (POPULATION_TIMEOUT if config.parallel == POPULATION else DATA_TIMEOUT)


def check_shareable(config: CompleteConfig, optimizer: ZOOptimizer) -> None:
    """Raise ValueError where ranks could not share the run's steps: they read more of a batch than its losses, or cannot be
    spread over workers; see :func:`l2l.parallel.population.plan_points`."""
    if config.parallel is None:
        return
    method, reason = optimizer.method, why_not(config, optimizer.method)
    if reason or isinstance(method, FirstOrder) or method.differentiates:
        raise ValueError(
            f"method {config.method!r} cannot be shared by several processes ({reason or 'it takes derivatives'}): use one of "
            "forward passes alone, such as mezo, or run it in one process"
        )
    if config.parallel == POPULATION:
        plan_points(optimizer)


# Rank 0.


class Lead(ABC):
    """What the process that writes the files does around its own run."""

    def __init__(self, config: CompleteConfig) -> None:
        self._every = config.checksum_every

    def compared(self, optimizer: ZOOptimizer) -> bytes:
        """Checksum of the weights before a step at which all compare them, which are then restored; else empty."""
        return checksum(optimizer) if due(optimizer.steps_done, self._every) else b""

    @abstractmethod
    def tell(self, content: bytes) -> None:
        """What :class:`l2l.train.runlog.RunLog` tells: the log as it is in the beginning, then record by record."""

    @abstractmethod
    def step(self, optimizer: ZOOptimizer, closures: Closures, lr: float, restored: bool, own: bytes) -> None:
        """Take the next step together.

        Args:
            lr: of its groups in this step.
            restored: whether its weights have been restored since the step before, which may have rounded them.
            own: from :meth:`compared`.
        """

    @abstractmethod
    def end(self, steps: int) -> dict[str, Any]:
        """The last step is taken. Figures for the summary: under ``sent``, by process, bytes sent per step."""


class RankLead(Lead):
    """What rank 0 does: the others read in the store what it has done."""

    def __init__(self, ranks: Ranks, config: CompleteConfig) -> None:
        super().__init__(config)
        self.ranks = ranks
        self._step: int | None = None  # of the next record, once the log is there

    def tell(self, content: bytes) -> None:
        if self._step is None:
            self.ranks.post(LOG, content, "log")
            self._step = len(parse_log(content, LOG).steps)
        else:
            self.ranks.post(f"{self._step}.{RECORD}", content, "log")
            self._step += 1

    @abstractmethod
    def others(self) -> list[int]:
        """The other ranks that take part."""

    def end(self, steps: int) -> dict[str, Any]:
        figures = {0: sent_figures(self.ranks, steps)}
        figures |= {rank: json.loads(word) for rank, word in self.ranks.end(self.others()).items()}
        return {"ranks": self.ranks.size, "sent": {str(rank): one for rank, one in sorted(figures.items())}}


def sent_figures(ranks: Ranks, steps: int) -> dict[str, float]:
    """Bytes that a rank has sent: of values per step, of their keys and of those asked for per step, of all checksums, and of
    the log per step."""
    sent, count = ranks.sent, max(steps, 1)
    figures = {"per_step": sent["step"] / count, "keys_per_step": ranks.overhead / count, "checksums": sent["checksum"]}
    return figures | ({"log_per_step": sent["log"] / count} if sent["log"] else {})


def due(step: int, every: int) -> bool:
    """Whether weights are compared before a step."""
    return step > 0 and step % every == 0


@final
class DataLead(RankLead):
    """Tells the learning rate, and whether weights were restored; evaluates its own pieces."""

    def __init__(self, ranks: Ranks, config: CompleteConfig, device: torch.device) -> None:
        super().__init__(ranks, config)
        self._shared = DataParallel(ranks, device)

    def others(self) -> list[int]:
        return list(range(1, self.ranks.size))

    def step(self, optimizer: ZOOptimizer, closures: Closures, lr: float, restored: bool, own: bytes) -> None:
        step = optimizer.steps_done
        self.ranks.post(f"{step}.{BEGIN}", _BEGIN.pack(restored, lr))
        _step_on_data(self._shared, optimizer, closures, step, own)
        self.ranks.delete([f"{step - 1}.{BEGIN}"] if step else [])


def _step_on_data(shared: DataParallel, optimizer: ZOOptimizer, closures: Closures, step: int, own: bytes) -> None:
    """A step of any rank: compare the weights where it is due, and evaluate."""
    shared.begin(step)
    if own:
        raise_where_different(shared.exchange(own, "checksum"), step)
    optimizer.step(closure=shared.joint(closures.at(step)), fresh=lambda number: shared.joint(closures.further(step, number)))


@final
class PopulationLead(RankLead):
    """Says who is there, evaluates its own share, collects the others', and tells the record of the step."""

    def __init__(self, ranks: Ranks, config: CompleteConfig, device: torch.device) -> None:
        super().__init__(ranks, config)
        self._device = device
        self._present: list[int] = []
        self._greeted = 0  # times that a worker has asked

    def others(self) -> list[int]:
        return self._present

    def step(self, optimizer: ZOOptimizer, closures: Closures, lr: float, restored: bool, own: bytes) -> None:
        step, theta = optimizer.steps_done, optimizer.theta
        self._welcome(step)
        points, closure = plan_points(optimizer), closures.at(step)
        workers = [0, *self._present]
        self.ranks.post(f"{step}.{DEAL}", struct.pack(f"<{len(workers)}H", *workers))
        parts = deal(points, len(workers))
        mine = evaluate_points(closure, theta, [points[i] for i in parts[0]])
        values = dict(zip(parts[0], mine, strict=True))
        deadline = time.monotonic() + self.ranks.timeout
        for worker, part in zip(workers[1:], parts[1:], strict=True):
            try:
                content = self.ranks.collect(f"{step}.{worker}", worker, max(0.0, deadline - time.monotonic()))
            except RankError as error:
                self._dismiss(worker, step, members_of([points[i] for i in part]), error)
                continue
            if own:
                theirs = self.ranks.collect(f"{step}.{worker}.{SUM}", worker)
                raise_where_different([own, *[b""] * (worker - 1), theirs], step)
            self.ranks.delete([f"{step}.{worker}", *([f"{step}.{worker}.{SUM}"] if own else [])])
            values |= dict(zip(part, unpack(content, self._device), strict=True))
        self.ranks.delete([f"{step}.{DEAL}"])
        step_by_answers(optimizer, closure, points, values)

    def _welcome(self, step: int) -> None:
        """Take in the workers that have asked since the last step."""
        count = self.ranks.add(HELLO, 0)
        for number in range(self._greeted + 1, count + 1):
            worker = int(self.ranks.collect(f"{HELLO}.{number}"))
            if worker not in self._present:
                logger.warning("step %d: worker %d takes part from here on", step, worker)
                self._present = sorted([*self._present, worker])
        self._greeted = count

    def _dismiss(self, worker: int, step: int, members: Sequence[int], error: RankError) -> None:
        self._present.remove(worker)
        self.ranks.delete([f"{FAILED}.{worker}"])
        self.ranks.post(f"{OUT}.{worker}", b"")
        logger.warning(
            "step %d goes on without directions %s of worker %d, until it asks again: %s", step, members, worker, error
        )


def step_by_answers(
    optimizer: ZOOptimizer, closure: Closure, points: Sequence[Point], values: dict[int, ClosureValue]
) -> list[int]:
    """Take a population's step from the values collected, and return the members left out because a value of theirs is missing.

    Evaluated in this process are points that are missing and belong to no member (the unperturbed parameters), and missing
    members while fewer are there than a step needs.

    Args:
        closure: of the step's batch.
        values: by index of the point.
    """

    def evaluate(wanted: int | None) -> None:
        indices = [i for i, point in enumerate(points) if point.member == wanted and i not in values]
        values.update(zip(indices, evaluate_points(closure, optimizer.theta, [points[i] for i in indices]), strict=True))

    evaluate(None)
    members = members_of(points)
    left_out = [one for one in members if any(p.member == one and i not in values for i, p in enumerate(points))]
    while len(members) - len(left_out) < LEAST:
        evaluate(left_out.pop(0))
    optimizer.step(closure=Answers(optimizer.theta, points, values, left_out), left_out=lambda: left_out)
    return left_out


def lead_of(ranks: Ranks, config: CompleteConfig, device: torch.device) -> RankLead:
    """What rank 0 does in a run of this configuration."""
    return (PopulationLead if config.parallel == POPULATION else DataLead)(ranks, config, device)


# The other ranks.


def follow(context: "RunContext", ranks: Ranks) -> None:
    """Take part in a run until rank 0 ends it: replay what it has done, then do each step with it. Nothing is written.

    Raises:
        ValueError: this rank runs another model, method or configuration than rank 0; the message names what differs.
        RankError: rank 0, or under ``data`` another rank, is gone or has failed.
    """
    optimizer = context.optimizer
    log = parse_log(ranks.collect(LOG, 0), LOG)
    check_same(context, log, f"rank {ranks.rank}")
    take = (_follow_population if context.config.parallel == POPULATION else _follow_data)(
        context, ranks, log.header["epsilon"]
    )
    before: StepRecord | None = None
    with stop_requests(), optimizer.theta.fused_steps():  # a signal is rank 0's to act on, which says when all end
        for number, record in enumerate(log.steps):
            take_again(optimizer, record, number, context.config.parallel == POPULATION)
            before = record
        try:
            while True:
                before = take(before)
        except RunFinished:
            ranks.leave(json.dumps(sent_figures(ranks, optimizer.steps_done - len(log.steps))).encode())


Take: TypeAlias = Callable[[StepRecord | None], StepRecord]
"""Takes the next step, and gives its record; its argument is the record before."""


def check_same(context: "RunContext", log: Log, who: str) -> None:
    """Raise ValueError where ``who`` runs something else than the log's writer; the message names what differs."""
    weights = weights_digests(context.model, [block.tensor for block in context.optimizer.blocks])
    own = run_header(context.config, context.optimizer, context.model, weights)
    same = {"run", "library", "torch"}  # identities of a directory, and versions, whose bits the checksums compare
    for name, mine, leads in header_differences(own, log.header):
        if name.split(".")[0] not in same:
            raise ValueError(
                f"{who} runs something else than rank 0: {name} is {mine!r} here and {leads!r} there; start all ranks "
                "with the same command, and the same files on every machine"
            )


@contextmanager
def prefix_in_memory(context: "RunContext", who: str) -> Iterator[None]:
    """The hidden states that a run keeps, in a process that writes no files: in memory, or not at all."""
    kept = context.prefix
    if kept is not None and kept.place == "disk":
        logger.warning("%s: hidden states do not fit into memory, so every pass runs all layers", who)
        kept = None
    with nullcontext() if kept is None else kept.cache.attached():
        if kept is not None:
            kept.plan(context, context.closures, context.config.steps)
        yield


def _record(ranks: Ranks, step: int, before: StepRecord | None, epsilon: float | None) -> StepRecord:
    return parse_record(ranks.collect(f"{step}.{RECORD}", 0), before, epsilon)


def _follow_data(context: "RunContext", ranks: Ranks, epsilon: float | None) -> Take:
    optimizer, every = context.optimizer, context.config.checksum_every
    shared = DataParallel(ranks, context.model.device)

    def take(before: StepRecord | None) -> StepRecord:
        step = optimizer.steps_done
        key = ranks.first_of([f"{step}.{RECORD}", f"{step}.{BEGIN}"], 0)
        if key.endswith(RECORD):
            record = _record(ranks, step, before, epsilon)
            take_again(optimizer, record, step, False)
            return record
        restored, lr = _BEGIN.unpack(ranks.read(key))
        own = checksum(optimizer) if due(step, every) else b""
        if restored:
            optimizer.theta.restore()
        for group in optimizer.param_groups:
            group["lr"] = lr
        _step_on_data(shared, optimizer, context.closures, step, own)
        return _record(ranks, step, before, epsilon)

    return take


def _follow_population(context: "RunContext", ranks: Ranks, epsilon: float | None) -> Take:
    optimizer, every = context.optimizer, context.config.checksum_every
    greeted = False

    def hello() -> None:
        ranks.delete([f"{OUT}.{ranks.rank}"])
        ranks.post(f"{HELLO}.{ranks.add(HELLO, 1)}", str(ranks.rank).encode())

    def evaluate(step: int, deal_: bytes) -> None:
        workers = [worker for (worker,) in struct.iter_unpack("<H", deal_)]
        if ranks.rank not in workers:
            if ranks.there(f"{OUT}.{ranks.rank}"):
                hello()
            return
        points = plan_points(optimizer)
        mine = [points[i] for i in deal(points, len(workers))[workers.index(ranks.rank)]]
        if due(step, every):
            ranks.post(f"{step}.{ranks.rank}.{SUM}", checksum(optimizer), "checksum")
        ranks.post(f"{step}.{ranks.rank}", pack(evaluate_points(context.closures.at(step), optimizer.theta, mine)))

    def take(before: StepRecord | None) -> StepRecord:
        nonlocal greeted
        step = optimizer.steps_done
        if not greeted and not ranks.there(f"{step}.{RECORD}"):
            hello()
            greeted = True
        key = ranks.first_of([f"{step}.{RECORD}", f"{step}.{DEAL}"], 0)
        if key.endswith(DEAL):
            evaluate(step, ranks.read(key))
        record = _record(ranks, step, before, epsilon)
        take_again(optimizer, record, step, True)
        return record

    return take
