"""Workers: objects in other processes, of this machine or of a Ray cluster, over which calls are dealt.

A call that a lost worker was at is made again by another one, so what is called must not depend on who is asked, nor on what
was asked before; a replacement is hired and made ready like the first. What a call raises is raised here.
"""

import logging
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from os import _exit
from threading import Thread
from typing import Any, final

from l2l.train import cluster
from l2l.train.cluster import Lost

logger = logging.getLogger(__name__)

LOSSES = 3
"""How many workers for each place may be lost in a row, nothing having come of any, before it is taken for no accident."""
PATIENCE = 60.0
"""Seconds without any worker after which a line says so."""


def end_with_parent() -> None:
    """In a process that another one has started: end when that one has, even where it was killed."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            _exit(1)

    Thread(target=watch, daemon=True).start()


class Hiring(ABC):
    """Abstract: how objects of a class, made without arguments, come to be in other processes, and are called there. Each makes
    one call at a time."""

    wants: str
    """What a worker needs of the machine that it is on, for a line that says that none is there."""

    @abstractmethod
    def hire(self) -> Any:
        """A new worker; it may come to be later."""

    @abstractmethod
    def call(self, worker: Any, name: str, given: Sequence[Any]) -> Any:
        """Begin a call of a method. Its task."""

    @abstractmethod
    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Those that have ended, once one has, or none when ``seconds`` are over."""

    @abstractmethod
    def result(self, task: Any) -> Any:
        """What a task that has ended gave; what it raised is raised.

        Raises:
            Lost: its process or machine is gone.
        """

    @abstractmethod
    def dismiss(self, worker: Any) -> None:
        """End a worker, whatever it is at."""


@dataclass(frozen=True, eq=False)
class Process:
    """A worker of this machine; it is its own task, as it has one at a time."""

    process: Any
    pipe: connection.Connection


@final
class LocalHiring(Hiring):
    """Processes of this machine."""

    wants = "memory"

    def __init__(self, kind: type) -> None:
        self._kind, self._context = kind, get_context("spawn")

    def hire(self) -> Process:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, self._kind), daemon=True)
        process.start()
        there.close()  # so that the end of the process is that of the pipe
        return Process(process, here)

    def call(self, worker: Process, name: str, given: Sequence[Any]) -> Process:
        with suppress(OSError):  # it is gone, which its result says
            worker.pipe.send((name, given))
        return worker

    def ended(self, tasks: Sequence[Process], seconds: float) -> list[Process]:
        found = connection.wait([task.pipe for task in tasks], seconds)
        return [task for task in tasks if task.pipe in found]

    def result(self, task: Process) -> Any:
        try:
            done, value = task.pipe.recv()
        except (EOFError, OSError) as error:
            task.process.join()
            raise Lost(f"its process ended with exit code {task.process.exitcode}") from error
        if done:
            return value
        try:
            error = task.pipe.recv()
        except Exception:  # it cannot be made again from its arguments
            error = None
        raise error or RuntimeError(value)

    def dismiss(self, worker: Process) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _serve(pipe: connection.Connection, kind: type) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the leader acts on it
    end_with_parent()
    held = kind()
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        _answer(pipe, held, name, given)


def _answer(pipe: connection.Connection, held: Any, name: str, given: Sequence[Any]) -> None:
    """Make a call, and send what came of it: (True, its value), or (False, the error in words) and then the error."""
    try:
        value = getattr(held, name)(*given)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        pipe.send((False, f"{type(error).__name__}: {error}"))
        try:
            pipe.send(error)
        except Exception:  # it holds what cannot be sent
            pipe.send(None)
        return
    pipe.send((True, value))


@final
class RayHiring(Hiring):
    """Actors of a Ray cluster.

    Args:
        ray: from :func:`l2l.train.cluster.connect`.
        reserved: from :func:`l2l.train.cluster.resources`.
    """

    def __init__(self, ray: Any, kind: type, reserved: dict[str, float]) -> None:
        self._ray, self._kind, self._reserved = ray, kind, reserved
        self.wants = f"{reserved} of a machine of the Ray cluster (`ray status` tells what is free)"

    def hire(self) -> Any:
        return self._ray.remote(self._kind).options(**self._reserved, max_restarts=0).remote()

    def call(self, worker: Any, name: str, given: Sequence[Any]) -> Any:
        return getattr(worker, name).remote(*given)

    def ended(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        return self._ray.wait(list(tasks), num_returns=1, timeout=seconds)[0]

    def result(self, task: Any) -> Any:
        return cluster.result(self._ray, task)

    def dismiss(self, worker: Any) -> None:
        self._ray.kill(worker)


@dataclass(eq=False)
class _Hired:
    number: int
    """From 1 on, in the order of hiring."""
    worker: Any
    task: Any
    """None: it has nothing to do."""
    item: int | None = None
    """What it is at; None: getting ready."""


@final
class Crew:
    """So many workers, each made ready by a call of its own, to which items are given one at a time.

    Args:
        ready: name and arguments of the method that is called first.
    """

    def __init__(self, hiring: Hiring, count: int, ready: tuple[str, Sequence[Any]]) -> None:
        self._hiring, self._count, self._ready = hiring, count, ready
        self._hired: list[_Hired] = []
        self._number = self._lost = 0

    def begin(self) -> None:
        """Hire all, and wait for the first to be ready. What it lacks is raised here."""
        self._advance(None)

    def map(self, name: str, items: Sequence[Sequence[Any]]) -> list[Any]:
        """What the method gives for each of these arguments, in their order.

        Raises:
            ValueError: one worker after the other was lost.
            Exception: what a call has raised; all workers are dismissed then.
        """
        return self._advance([(name, item) for item in items])

    def close(self) -> None:
        """Dismiss all."""
        while self._hired:
            self._hiring.dismiss(self._hired.pop().worker)

    def _advance(self, calls: list[tuple[str, Sequence[Any]]] | None) -> list[Any]:
        """Make these calls; None: until one worker is ready."""
        found: dict[int, Any] = {}
        waiting = list(range(len(calls or ())))
        try:
            while len(self._hired) < self._count:
                self._hire()
            while len(found) < len(calls) if calls is not None else all(one.task is not None for one in self._hired):
                for one in self._hired:
                    if one.task is None and waiting and calls is not None:
                        one.item = waiting.pop(0)
                        one.task = self._hiring.call(one.worker, *calls[one.item])
                self._take(found, waiting)
        except BaseException:  # whoever calls again finds no answers to this
            self.close()
            raise
        return [found[number] for number in range(len(found))]

    def _hire(self) -> None:
        self._number += 1
        worker = self._hiring.hire()
        self._hired.append(_Hired(self._number, worker, self._hiring.call(worker, *self._ready)))

    def _take(self, found: dict[int, Any], waiting: list[int]) -> None:
        """Wait for tasks, keep what they gave, and replace workers that are lost."""
        busy = [one for one in self._hired if one.task is not None]
        ended = self._hiring.ended([one.task for one in busy], PATIENCE)
        if not ended and all(one.item is None for one in busy):
            logger.warning("no worker is ready after %g s; each loads the model, and needs %s", PATIENCE, self._hiring.wants)
        for one in [one for one in busy if one.task in ended]:
            try:
                value = self._hiring.result(one.task)
            except Lost as error:
                self._replace(one, waiting, error)
                continue
            if one.item is not None:
                found[one.item] = value
                self._lost = 0
            one.task = one.item = None

    def _replace(self, lost: _Hired, waiting: list[int], error: Lost) -> None:
        self._hired.remove(lost)
        self._hiring.dismiss(lost.worker)
        self._lost += 1
        if self._lost >= LOSSES * self._count:
            raise ValueError(
                f"{self._lost} workers were lost one after the other, nothing having come of any ({error}), for want of memory "
                "perhaps: the same command continues; with fewer --processes each has more"
            ) from error
        if lost.item is None:
            logger.warning("worker %d is lost (%s): another one takes its place", lost.number, error)
        else:
            waiting.insert(0, lost.item)
            logger.warning("worker %d is lost (%s): what it was at is done by another one", lost.number, error)
        self._hire()
