"""Who runs the jobs: a Ray cluster as a module in its place, and what is said where there is none."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

import pytest
from clusters import Faults
from compared import result, small

from l2l.experiments import runner as executors
from l2l.experiments.presets.compare import run_comparison
from l2l.experiments.runner import Trial, executor_of
from l2l.experiments.stats import Cell
from l2l.train.cluster import connect, resources

TRIALS = [Trial(result(Cell("s", "full", "t"), "mezo", 1.0, seed=number), {}, "") for number in range(5)]


class Cluster(ModuleType):
    """What is used of Ray: tasks run when they are asked for, the last one begun first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.most = 0
        self.cancelled: list[object] = []
        self.options: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.begun = 0
        self.exceptions = Faults

    def is_initialized(self) -> bool:
        return self.begun > 0

    def init(self, **options: Any) -> None:
        self.given = options
        self.begun += 1

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        self.options |= options

        def task(function: Callable[..., Any]) -> Any:
            begin = type("Task", (), {"remote": staticmethod(lambda *given: Begun(function, given))})
            begin.options = lambda **more: self.options.update(more) or begin
            return begin

        return task

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
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
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
    assert cluster.options == {"num_cpus": 1, "num_gpus": 0, "max_retries": executors.RETRIES}


def test_a_task_that_fails_ends_the_others(cluster, monkeypatch):
    monkeypatch.setattr(executors, "run_trial", third_fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        executor_of("ray", 3)(TRIALS, lambda record: None)
    assert len(cluster.cancelled) == 2


def test_what_a_task_raises_is_raised_here_as_it_was(cluster, monkeypatch):
    def fails(trial: Trial) -> dict[str, Any]:
        raise Faults.RayTaskError(FileNotFoundError("no such file there"))

    monkeypatch.setattr(executors, "run_trial", fails)
    with pytest.raises(FileNotFoundError, match=r"^no such file there$"):
        executor_of("ray", 1)(TRIALS, lambda record: None)


def test_a_run_that_is_lost_again_and_again_is_told_of_and_fewer_at_a_time_are_the_way_on(cluster, monkeypatch):
    def needs_the_memory_of_two(trial: Trial) -> dict[str, Any]:
        if cluster.most > 1:
            raise Faults.RayError("the machine has no memory left\nand more")
        return seed_of(trial)

    monkeypatch.setattr(executors, "run_trial", needs_the_memory_of_two)
    with pytest.raises(ValueError, match=r"4 times \(the machine has no memory left\): the same command .* fewer --processes"):
        executor_of("ray", 2)(TRIALS, lambda record: None)
    cluster.most = 0
    assert len(executor_of("ray", 1)(TRIALS, lambda record: None)) == len(TRIALS)


def test_a_machine_without_the_directory_is_named(cluster, tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    run = executor_of("ray", 1)
    gone.rmdir()
    monkeypatch.setattr(executors.os, "getcwd", lambda: str(gone))
    with pytest.raises(FileNotFoundError, match=r"has no directory '.*gone'"):
        run(TRIALS, lambda record: None)


@pytest.mark.parametrize("device, gpus", [(None, 0), ("cpu", 0), ("cuda:1", 1)])
def test_a_run_reserves_a_gpu_where_its_device_is_one(device: str | None, gpus: int):
    assert resources(device) == {"num_cpus": 1, "num_gpus": gpus}


def test_an_address_is_taken_from_the_option_else_from_the_environment_else_the_cluster_is_here(cluster, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        connect(here)
        assert cluster.given == {"address": here, "log_to_driver": False}
        connect("elsewhere:1")  # it is connected already
        assert cluster.begun == 1
        cluster.begun = 0
        monkeypatch.setenv("RAY_ADDRESS", here)
        connect()
        assert cluster.given["address"] == here
    cluster.begun = 0
    monkeypatch.delenv("RAY_ADDRESS")
    connect(cpus=3)
    assert cluster.given == {"address": "local", "num_cpus": 3, "include_dashboard": False, "log_to_driver": False}


@pytest.mark.parametrize("address", ["nobody", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_where_nobody_answers_one_line_says_so_at_once(cluster, address: str):
    with pytest.raises(ValueError, match=f"ray_address='{address}': no Ray cluster can be joined there"):
        executor_of("ray", 1, address)
    assert not cluster.begun


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
