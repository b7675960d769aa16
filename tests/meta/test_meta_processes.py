"""Meta-training on several processes: the run of one process to the last bit, whoever evaluates, is lost, or takes over."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bowl import TINY, Bowl, point_on, tuner_of, weights_of
from clusters import WHY, Actors, ray_cluster

import l2l
from l2l.cli import main
from l2l.meta import population
from l2l.meta.module import MetaTraining
from l2l.meta.objectives import OBJECTIVES, make_objective
from l2l.meta.population import OUTER_STEP, Population
from l2l.meta.state import PopulationObjective
from l2l.tasks import inspect as inspect_task

pytestmark = pytest.mark.in_turn

EVOLUTION: dict[str, Any] = {
    **{"objective": "evolution", "objective_args": {"population": 2, "steps": 1}, "trajectory": "zo", "steps": 4},
    **{"outer_lr": 1.0, "lr": 1e-3},
}
FULL_RUN = {"objective": "es_full_run", "objective_args": {"population": 1, "steps": 4}, "architecture": "table", "steps": 3}
FIRST_ORDER = {"trajectory": "teacher", "trajectory_gradient": "own", "features": "standard", "steps": 3}
ON_RAY = {"executor": "ray", "processes": 2}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Actors:
    found = Actors()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(inspect_task.logger, "disabled", False)  # workers are in this process, and set it
    torch.set_num_threads(1)
    return found


At = dict[int, Callable[[], None]]
"""What happens before the members of an outer step are evaluated."""


def learned(out: Path, **given: Any) -> tuple[bytes, ...]:
    """What a run leaves."""
    l2l.meta_train(out=str(out), **{**TINY, **EVOLUTION, **given})
    assert not (out / OUTER_STEP).exists()
    return tuple((out / file).read_bytes() for file in ("tuner.safetensors", "config.json", "metrics.csv"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    """The run of one process."""
    torch.set_num_threads(1)
    return learned(tmp_path_factory.mktemp("alone"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bytes, ...]]:
    """Learns a tuner, with what happens at some outer steps; what it leaves."""

    def disturbed(name: str, at: At | None = None, **given: Any) -> tuple[bytes, ...]:
        undisturbed = Population.evaluate

        def evaluate(self: Population, theta: Any, tuner: Any, step: Any, count: int) -> Any:
            (at or {}).get(step.step, lambda: None)()
            return undisturbed(self, theta, tuner, step, count)

        with monkeypatch.context() as patch:
            patch.setattr(Population, "evaluate", evaluate)
            return learned(tmp_path / name, **given)

    return disturbed


def test_the_tuner_is_that_of_one_process_to_the_last_bit(run, alone, ray: Actors):
    assert run("on-ray", **ON_RAY) == alone
    assert len(ray.made) == 2 and all(actor.dead for actor in ray.made)  # dismissed in the end


@pytest.mark.parametrize("given", [FULL_RUN, FIRST_ORDER], ids=["full run", "first-order trajectory"])
def test_so_it_is_with_other_objectives_and_trajectories(run, ray: Actors, given: dict[str, Any]):
    assert run("on-ray", **ON_RAY, **given) == run("alone", **given)


def test_members_of_a_lost_worker_are_evaluated_by_others(run, alone, ray: Actors, caplog):
    found = run("lossy", {2: lambda: ray.kill(ray.made[0])}, **ON_RAY)
    assert "worker 1 is lost (the actor is dead): what it was at is done by another one" in caplog.text
    assert len(ray.made) == 3
    assert found == alone


class Cut(Exception):
    """Stands for whatever ends a process."""


def test_a_run_is_continued_with_another_number_of_processes(run, alone, ray: Actors):
    def cut() -> None:
        raise Cut

    with pytest.raises(Cut):
        run("cut", {3: cut}, **ON_RAY)
    assert run("cut", executor="ray", processes=9) == alone
    assert len(ray.made) == 2 + 4  # no more than there are members


def test_a_worker_that_reads_something_else_is_told_of_before_the_first_step(run, ray: Actors, monkeypatch, tmp_path: Path):
    other = l2l.load_model("l2l/tiny")
    next(other.parameters()).data.add_(1e-3)
    load = population.Worker.load

    def elsewhere(self: population.Worker, *told: Any) -> None:
        monkeypatch.setattr("l2l.meta.run.load_model", lambda *_: other)
        load(self, *told)

    monkeypatch.setattr(population.Worker, "load", elsewhere)
    monkeypatch.setattr(MetaTraining, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"reads something else than the leader: model.*: all machines need the same files"):
        run("other", **ON_RAY)


SHARED = {name: kind for name, kind in OBJECTIVES.items() if issubclass(kind, PopulationObjective)}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_members_depend_on_nobody_and_leave_the_very_bits_of_theta(name: str):
    model, objective = Bowl(), make_objective(name, population=2, steps=3)
    assert isinstance(objective, PopulationObjective)
    point, before = point_on(model, tuner_of(model)), weights_of(model)
    backwards = [objective.member(point, number) for number in reversed(range(4))]
    assert [objective.member(point, number) for number in range(objective.members)] == backwards[::-1]
    assert len({member.loss for member in backwards}) == 4
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    told = objective(replace(point, elsewhere=lambda count: backwards[::-1][:count]))
    (here,) = torch.autograd.grad(objective(point).surrogate, [next(point.method.tuner.network.parameters())])
    (there,) = torch.autograd.grad(told.surrogate, [next(point.method.tuner.network.parameters())])
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - SHARED.keys()))
def test_an_objective_without_members_is_refused_by_name_before_anything_is_loaded(name: str, tmp_path: Path, capsys):
    command = ["meta-train", "--objective", name, "--processes", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"objective '{name}' has no members that several processes could evaluate: use evolution or es_full_run" in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_an_object_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="model is an object, and other processes load theirs by name"):
        l2l.meta_train(l2l.load_model("l2l/tiny"), out=str(tmp_path / "out"), **{**TINY, **EVOLUTION, "processes": 2})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # starts processes that load the model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("given", [{}, FULL_RUN, FIRST_ORDER], ids=["evolution", "full run", "first-order trajectory"])
def test_processes_of_this_machine_of_which_one_is_killed(run, given: dict[str, Any], monkeypatch, caplog):
    torch.set_num_threads(1)
    leaders: list[Population] = []
    monkeypatch.setattr(Population, "close", lambda self, close=Population.close: [leaders.append(self), close(self)])
    begin = Population.begin
    monkeypatch.setattr(Population, "begin", lambda self, folder: [begin(self, folder), leaders.append(self)])

    def kill() -> None:
        assert leaders[0]._crew is not None
        os.kill(leaders[0]._crew._hired[0].worker.process.pid, signal.SIGKILL)

    found = run("killed", {2: kill}, processes=2, **given)
    assert "its process ended with exit code -9" in caplog.text
    assert found == run("alone", **given)


@pytest.mark.slow  # starts a cluster of two machines
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # of Ray, on the way out
def test_a_cluster_that_loses_a_machine(run, alone, monkeypatch: pytest.MonkeyPatch, caplog):
    pytest.importorskip("ray", reason=WHY)
    torch.set_num_threads(1)
    with ray_cluster(2, monkeypatch) as (cluster, machines):

        def lose() -> None:
            cluster.remove_node(machines[0], allow_graceful=False)
            cluster.add_node(num_cpus=1)

        found = run("on-ray", {2: lose}, ray_address=cluster.address, **ON_RAY)
    assert "is lost" in caplog.text
    assert found == alone
