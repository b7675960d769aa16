"""Ranks as processes: 1, 2 and 4 have the same weights, and so has a run of which one is killed (kill -9) and started again.

They compare their weights before step 200, to the last bit, so that a run that ends has found them equal.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE

from l2l.report.run_directory import read_metrics
from l2l.train.runlog import Log, read_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OPTIONS = "--train_size 64 --dev_size 4 --test_size 4 --batch_size 4 --micro_batch 1 --log_every 1 --scheme lora --lr 1e-3 "
OPTIONS += "--progress false"
DATA = [*OPTIONS.split(), "--steps", "201", "--checksum_every", "10", "--parallel", "data"]
POPULATION = [*OPTIONS.split(), "--method", "mezo", "--num_directions", "4"]
LONG = 1500.0
"""Seconds until a run counts as stuck: four processes on a busy machine."""


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Group:
    """The processes of a run, each started by hand as a cluster's scheduler does."""

    def __init__(self, out: Path, size: int, options: list[str]) -> None:
        self.out, self.size, self.options, self.port = out, size, options, free_port()
        self.members: dict[int, subprocess.Popen[str]] = {}
        for rank in range(size):
            self.start(rank)

    def start(self, rank: int) -> None:
        given = {"RANK": rank, "WORLD_SIZE": self.size, "MASTER_ADDR": "localhost", "MASTER_PORT": self.port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in given.items()}}
        command = [sys.executable, "-m", "l2l", "fine-tune", "--out", str(self.out), *self.options]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.members[rank] = subprocess.Popen(command, env=environment, **pipes)

    def kill(self, rank: int) -> None:
        self.members[rank].send_signal(signal.SIGKILL)
        self.members[rank].communicate(timeout=PATIENCE)

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + LONG
        while self.step() < step:
            assert time.monotonic() < deadline, f"no step {step} yet"
            assert self.members[0].poll() is None, self.members[0].communicate()[1]
            time.sleep(0.05)

    def step(self) -> int:
        path = self.out / "metrics.csv"
        rows = read_metrics(path) if path.is_file() else []
        return int(rows[-1]["step"]) if rows else -1

    def ended(self) -> dict[int, str]:
        """What each rank has said on stderr, once all have ended well."""
        found = {}
        for rank, one in self.members.items():
            _, found[rank] = one.communicate(timeout=LONG)
            assert one.returncode == 0, f"rank {rank}: {found[rank]}"
        return found


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    made: list[Group] = []
    yield made
    for group in made:
        for one in group.members.values():
            one.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Log:
    out = tmp_path_factory.mktemp("alone") / "out"
    command = [sys.executable, "-m", "l2l", "fine-tune", "--out", str(out), *DATA]
    subprocess.run(command, check=True, capture_output=True, timeout=LONG, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return read_log(out / "steps.l2l")


def losses(log: Log) -> list[tuple[float, ...]]:
    return [step.losses for step in log.steps]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_the_weights_of_one_process_after_200_steps(tmp_path: Path, alone: Log, size: int, groups: list[Group]):
    groups.append(Group(tmp_path / "out", size, DATA))
    groups[0].ended()
    assert losses(read_log(tmp_path / "out" / "steps.l2l")) == losses(alone)


def test_torchrun_starts_the_ranks_of_the_same_command(tmp_path: Path, alone: Log):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launcher, "-m", "l2l", "fine-tune", "--out", str(tmp_path / "out"), *DATA]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LONG, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "bytes sent" in done.stdout
    assert losses(read_log(tmp_path / "out" / "steps.l2l")) == losses(alone)


@pytest.mark.parametrize("size", [2, 4])
def test_a_data_parallel_rank_that_is_killed_catches_up(tmp_path: Path, alone: Log, size: int, groups: list[Group]):
    groups.append(group := Group(tmp_path / "out", size, DATA))
    group.wait_for(60)
    group.kill(size - 1)
    before = group.step()
    group.start(size - 1)
    group.ended()
    assert before < 200
    assert losses(read_log(tmp_path / "out" / "steps.l2l")) == losses(alone)


def test_a_population_whose_worker_is_killed_every_20_steps_ends_and_replays(tmp_path: Path, groups: list[Group]):
    options = [*POPULATION, "--parallel", "population", "--steps", "121", "--checksum_every", "10", "--rank_timeout", "3"]
    groups.append(group := Group(tmp_path / "out", 3, options))
    for step in range(20, 101, 20):
        group.wait_for(step)
        group.kill(2)
        group.start(2)
    said = group.ended()
    log = read_log(tmp_path / "out" / "steps.l2l")
    left_out = [len(step.readings[0]) for step in log.steps]
    assert 0 < sum(map(bool, left_out)) < len(left_out)
    assert "goes on without directions" in said[0]
    replayed = [sys.executable, "-m", "l2l", "replay", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
    subprocess.run(replayed, check=True, capture_output=True, timeout=LONG)
    kept, rebuilt = (tmp_path / name / "adapter_model.safetensors" for name in ("out/model", "again"))
    assert kept.read_bytes() == rebuilt.read_bytes()
    print(f"steps with directions left out: {sum(map(bool, left_out))} of {len(left_out)}")
