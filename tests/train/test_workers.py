"""Calls dealt over workers: their results in order, whoever is lost; what they raise, as it was."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from clusters import Actors

from l2l.train import workers
from l2l.train.workers import Crew, LocalHiring, Process, RayHiring


class Odd(Exception):
    """An error that cannot be made again, and, where it holds a function, not even sent."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")
        self.held: Any = None


class Squares:
    """In another process: squares numbers, once it is ready."""

    def __init__(self) -> None:
        self.ready = False

    def prepare(self, power: int) -> None:
        self.ready, self.power = True, power

    def raised(self, number: int) -> tuple[int, int]:
        assert self.ready
        return number**self.power, os.getpid()

    def dies_once(self, number: int, mark: str) -> int:
        if number == 1 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number**self.power

    def fails(self, number: int) -> None:
        raise FileNotFoundError(f"no {number} here")

    def fails_oddly(self, sent: bool) -> None:
        error = Odd(1, 2)
        error.held = None if sent else lambda: None
        raise error


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    found = Crew(LocalHiring(Squares), 2, ("prepare", (2,)))
    yield found
    found.close()


def test_processes_of_this_machine_give_results_in_order_and_one_that_is_killed_is_replaced(crew: Crew, tmp_path, caplog):
    crew.begin()
    found = crew.map("raised", [(number,) for number in range(6)])
    assert [value for value, _ in found] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {process for _, process in found}
    with caplog.at_level(logging.WARNING):
        assert crew.map("dies_once", [(number, str(tmp_path / "mark")) for number in range(4)]) == [0, 1, 4, 9]
    assert "its process ended with exit code -9): what it was at is done by another one" in caplog.text
    with pytest.raises(FileNotFoundError, match="no 7 here") as error:
        crew.map("fails", [(7,)])
    assert "in fails" in error.value.__notes__[0]  # where it came from


@pytest.mark.parametrize("sent", [True, False])
def test_an_error_that_cannot_be_sent_is_raised_in_words(sent: bool):
    here, there = Pipe()
    with here, there:
        workers._answer(there, Squares(), "fails_oddly", (sent,))
        with pytest.raises(RuntimeError, match=r"^Odd: 1 and 2$"):
            LocalHiring(Squares).result(Process(None, here))


def actors(ray: Actors, count: int = 2) -> Crew:
    return Crew(RayHiring(ray, Squares, {"num_cpus": 1}), count, ("prepare", (3,)))


def test_an_error_ends_all_workers_and_the_next_call_has_new_ones():
    crew = actors(ray := Actors())
    with pytest.raises(FileNotFoundError, match="no 3 here"):
        crew.map("fails", [(3,), (4,)])
    assert all(actor.dead for actor in ray.made)
    assert [value for value, _ in crew.map("raised", [(2,), (3,)])] == [8, 27]
    assert len(ray.made) == 4


class Small(Actors):
    """A cluster with the memory for one actor."""

    def get(self, task: Any) -> Any:
        if sum(not actor.dead for actor in self.made) > 1:
            raise self.exceptions.RayError("no memory")
        return super().get(task)


def test_workers_that_are_lost_again_and_again_are_told_of_and_fewer_are_the_way_on(caplog):
    with pytest.raises(ValueError, match=r"^6 workers were lost one after the other.*no memory.*fewer --processes"):
        actors(Small()).begin()
    assert "worker 1 is lost (no memory): another one takes its place" in caplog.text
    assert [value for value, _ in actors(Small(), 1).map("raised", [(2,), (3,)])] == [8, 27]


def test_that_no_worker_comes_is_told(monkeypatch, caplog):
    ray = Actors()
    waits = iter([True, True, False])

    def wait(tasks: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], tasks) if next(waits, False) else (tasks[:1], tasks[1:])

    monkeypatch.setattr(ray, "wait", wait)
    actors(ray).begin()
    assert caplog.text.count("no worker is ready after 60 s; each loads the model, and needs {'num_cpus': 1}") == 2
