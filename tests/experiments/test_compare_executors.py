"""Who runs the jobs: a Ray cluster as a module in its place, and what is said where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

import pytest
from compared import result, small

from l2l.experiments import runner as executors
from l2l.experiments.presets.compare import run_comparison
from l2l.experiments.runner import Trial, executor_of
from l2l.experiments.stats import Cell

TRIALS = [Trial(result(Cell("s", "full", "t"), "mezo", 1.0, seed=number), {}, "") for number in range(5)]


class Cluster(ModuleType):
    """What is used of Ray: tasks run when they are asked for, the last one begun first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.most = 0
        self.cancelled: list[object] = []
        self.options: dict[str, Any] = {}
        self.begun = 0

    def is_initialized(self) -> bool:
        return self.begun > 0

    def init(self, **options: Any) -> None:
        self.begun += 1

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        self.options |= options
        return lambda function: type("Task", (), {"remote": staticmethod(lambda *given: Begun(function, given))})

    def wait(self, begun: Sequence[Begun], num_returns: int) -> tuple[list[Begun], list[Begun]]:
        self.most = max(self.most, len(begun))
        return [begun[-1]], list(begun[:-1])

    def get(self, begun: Begun) -> Any:
        return begun.function(*begun.given)

    def cancel(self, begun: Begun) -> None:
        self.cancelled.append(begun)


class Begun:
    """A task that was asked for."""

    def __init__(self, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        self.function, self.given = function, given


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    found = Cluster()
    monkeypatch.setitem(sys.modules, "ray", found)
    return found


def seed_of(trial: Trial) -> dict[str, Any]:
    return {"seed": trial.head.seed}


def third_fails(trial: Trial) -> dict[str, Any]:
    if trial.head.seed == 2:
        raise RuntimeError("out of luck")
    return seed_of(trial)


def test_ray_gives_the_records_in_the_order_of_the_trials_and_runs_so_many_at_a_time(cluster, monkeypatch):
    monkeypatch.setattr(executors, "run_trial", seed_of)
    arrived: list[int] = []
    found = executor_of("ray", 2)(TRIALS, lambda record: arrived.append(record["seed"]))
    assert [record["seed"] for record in found] == [0, 1, 2, 3, 4]
    assert sorted(arrived) == [0, 1, 2, 3, 4] != arrived
    assert cluster.most == 2
    assert cluster.options["num_cpus"] == 1


def test_a_task_that_fails_ends_the_others(cluster, monkeypatch):
    monkeypatch.setattr(executors, "run_trial", third_fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        executor_of("ray", 3)(TRIALS, lambda record: None)
    assert len(cluster.cancelled) == 2


def test_without_ray_one_line_says_what_to_install_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'l2l\[ray\]'"):
        run_comparison(small(tmp_path / "out", executor="ray"))
    assert not (tmp_path / "out").exists()


def test_a_process_that_was_killed_is_told_of_with_the_way_on(monkeypatch):
    def submit(*_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future

    monkeypatch.setattr(executors.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(ValueError, match="the same command continues"):
        executor_of("local", 2)(TRIALS, lambda record: None)


def test_a_comparison_runs_over_ray_by_the_same_code(cluster, tmp_path):
    found = run_comparison(small(tmp_path / "out", executor="ray", methods=["mezo"]))
    assert found["average_rank"] == {"mezo": 1.0}
    assert (tmp_path / "out" / "index.html").is_file()
    assert cluster.begun == 1
