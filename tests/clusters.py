"""Ray in the tests: a stand-in of it within this process, and a cluster of several machines, all of which are this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

WHY = "Ray is not installed: pip install 'l2l[ray]' runs this test"


class Faults:
    """The errors of Ray that are told apart."""

    class RayError(Exception):
        """A fault of the cluster."""

    class RayTaskError(RayError):
        """An error of a task's own."""

        def __init__(self, cause: BaseException) -> None:
            super().__init__("a traceback from elsewhere")
            self.cause = cause


class Actors(ModuleType):
    """What is used of Ray's actors: each is an object of this process, whose calls are made when they are asked for."""

    exceptions = Faults

    def __init__(self) -> None:
        super().__init__("ray")
        self.made: list[Actor] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, kind: type) -> Any:
        return Hiring(self, kind)

    def wait(self, tasks: Sequence[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        done = [task for task in tasks if not task.actor.slow][:num_returns]
        return done, [task for task in tasks if task not in done]

    def get(self, task: Call) -> Any:
        if task.error is not None:
            raise task.error
        return task.value

    def kill(self, actor: Actor) -> None:
        actor.dead = True


class Hiring:
    """A class whose objects are made on the cluster."""

    def __init__(self, ray: Actors, kind: type) -> None:
        self.ray, self.kind = ray, kind

    def options(self, **reserved: Any) -> Hiring:
        return self

    def remote(self) -> Actor:
        self.ray.made.append(Actor(self.kind()))
        return self.ray.made[-1]


class Actor:
    """An object on the cluster. A dead one answers nothing any more, a slow one not yet."""

    def __init__(self, held: Any) -> None:
        self.held, self.dead, self.slow = held, False, False

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda *given: Call(self, name, given))})


class Call:
    """A call of an actor's method, and what came of it."""

    def __init__(self, actor: Actor, name: str, given: tuple[Any, ...]) -> None:
        self.actor, self.value, self.error = actor, None, None
        if actor.dead:
            self.error = Faults.RayError("the actor is dead\nand more")
            return
        try:
            self.value = getattr(actor.held, name)(*given)
        except Exception as error:
            self.error = Faults.RayTaskError(error)


@contextmanager
def ray_cluster(machines: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """The cluster, and its machines beside the first, which does no work; each has one processor."""
    ray = pytest.importorskip("ray", reason=WHY)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(machines)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
