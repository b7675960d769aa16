"""A population over actors: the run of one process to the last bit, whoever evaluates; what is lost costs its members only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from clusters import WHY, Actors
from daily import daily_slice

import l2l
from l2l.params import Blocks
from l2l.train.on_ray import RayLead
from l2l.train.replay import rebuild
from l2l.train.runlog import NAME, StepRecord, read_log, read_run_log
from l2l.train.trainer import FineTuneResult

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {
    **{"model": "l2l/tiny", "task": "world_stars", "method": "mezo", "num_directions": 4, "lr": 3e-4, "steps": 6},
    **{"batch_size": 2, "train_size": 16, "dev_size": 4, "test_size": 4, "progress": False, "save": "log"},
}
ON_RAY: dict[str, Any] = {"parallel": "population", "executor": "ray", "workers": 2, "checksum_every": 1}
At = dict[int, Callable[[Actors], None]]
"""What happens before a step."""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Actors:
    found = Actors()
    monkeypatch.setitem(sys.modules, "ray", found)
    torch.set_num_threads(1)
    return found


@pytest.fixture
def run(tmp_path: Path, ray: Actors, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FineTuneResult]:
    """Fine-tunes on the stand-in, with what happens before some steps."""

    def fine_tuned(at: At | None = None, name: str = "on-ray", **given: Any) -> FineTuneResult:
        undisturbed = RayLead.step

        def step(lead: RayLead, optimizer: Any, *rest: Any) -> None:
            (at or {}).get(optimizer.steps_done, lambda _: None)(ray)
            undisturbed(lead, optimizer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(RayLead, "step", step)
            return l2l.fine_tune(**SMALL | ON_RAY | {"out": str(tmp_path / name)} | given)

    return fine_tuned


def steps(found: FineTuneResult) -> list[StepRecord]:
    return read_log(found.out / NAME).steps


def missing(found: FineTuneResult) -> list[list[int]]:
    """The directions that each step has left out."""
    return [step.get("left_out", []) for step in read_run_log(found.out)[1]]


def replays(found: FineTuneResult) -> bool:
    """Whether the log rebuilds the weights of the run, bit for bit."""
    log = read_log(found.out / NAME)
    again = rebuild(log, to="best")
    pairs = zip(Blocks.of(found.model), Blocks.of(again), strict=True)
    return log.best not in (0, None) and all(torch.equal(a.tensor, b.tensor) for a, b in pairs)


@pytest.mark.parametrize("given", daily_slice([{}, {"method": "es"}, {"estimator": "one_sided"}, {"lr": "auto"}], 2, name=str))
def test_the_run_of_one_process_to_the_last_bit(run, tmp_path: Path, given: dict[str, Any]):
    shared, alone = run(**given), l2l.fine_tune(**SMALL | {"perturb": "functional", "out": str(tmp_path / "alone")} | given)
    assert [step.losses for step in steps(shared)] == [step.losses for step in steps(alone)]
    assert [step.estimates for step in steps(shared)] == [step.estimates for step in steps(alone)]
    for one, other in zip(Blocks.of(shared.model), Blocks.of(alone.model), strict=True):
        assert torch.equal(one.tensor, other.tensor)
    assert replays(shared) and missing(shared) == [[]] * 6


def test_a_worker_that_is_lost_costs_its_members_and_its_replacement_replays_the_log(run, caplog):
    found = run({2: lambda ray: ray.kill(ray.made[1])})
    assert missing(found) == [[], [], [2, 3], [], [], []]
    assert "step 2 goes on without directions [2, 3] of worker 2: it is lost (the actor is dead)" in caplog.text
    assert "step 3: worker 3 takes part from here on" in caplog.text
    assert replays(found)  # and at each step the weights of all have been compared
    assert found.summary["parallel"] | {"sent": None} == {"workers": 2, "lost": 1, "left_out": 2, "sent": None}


def test_a_late_worker_is_left_out_until_it_has_answered(run, caplog):
    def slow(late: bool) -> Callable[[Actors], None]:
        return lambda ray: setattr(ray.made[0], "slow", late)

    found = run({1: slow(True), 4: slow(False)}, rank_timeout=0.5)
    assert missing(found) == [[], [0, 1], [], [], [], []]  # steps 2 and 3 are the other worker's alone
    assert "directions [0, 1] of worker 1: no answer for 0.5 s" in caplog.text
    assert "step 4: worker 1 takes part from here on" in caplog.text
    assert replays(found) and found.summary["parallel"]["lost"] == 0


def test_where_all_are_lost_the_step_is_made_of_the_least_and_replacements_go_on(run):
    found = run({3: lambda ray: [ray.kill(actor) for actor in ray.made]})
    assert missing(found) == [[], [], [], [2, 3], [], []]  # two members were evaluated by the leader
    assert replays(found)


def test_a_run_that_is_continued_has_the_bits_of_the_uninterrupted_one(run):
    def interrupt(ray: Actors) -> None:
        raise KeyboardInterrupt

    whole = run(name="whole")
    with pytest.raises(KeyboardInterrupt):
        run({4: interrupt}, checkpoint_every=2)
    again = run(checkpoint_every=2, workers=3)  # another number of workers changes nothing
    assert [step.losses for step in steps(again)] == [step.losses for step in steps(whole)]
    assert replays(again)


def test_members_and_workers_need_not_match(run):
    assert [step.losses for step in steps(run(workers=3))] == [step.losses for step in steps(run(name="many", workers=5))]


def test_workers_that_load_for_long_are_told_of_and_more_time_is_the_way_on(run, ray: Actors, monkeypatch):
    def wait(tasks: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return (tasks, []) if timeout > 1 or timeout == 0 else ([], tasks)

    monkeypatch.setattr(ray, "wait", wait)
    with pytest.raises(ValueError, match=r"no worker .* after 0.5 s; .*'num_cpus': 1.* more time with --rank_timeout"):
        run(rank_timeout=0.5)
    assert len(steps(run(rank_timeout=2.0, name="longer"))) == SMALL["steps"]


def test_what_a_worker_lacks_is_told_as_it_was(run, monkeypatch):
    monkeypatch.setattr("l2l.train.on_ray.os.getcwd", lambda: "/no/such/directory")
    with pytest.raises(FileNotFoundError, match="has no directory '/no/such/directory'"):
        run()


def test_weights_that_differ_are_found_at_the_step(run):
    def spoil(ray: Actors) -> None:
        next(ray.made[1].held._context.model.parameters()).data.add_(1e-3)

    with pytest.raises(ValueError, match="before step 3 the weights of rank 2 differ"):
        run({3: spoil})


def test_what_a_population_over_ray_cannot_be_is_refused_before_anything_is_written(run, tmp_path: Path):
    for given, message in (
        ({"parallel": None}, "parallel is None: use --parallel population"),
        ({"num_directions": 1}, "set --num_directions"),
        ({"model": l2l.load_model("l2l/tiny")}, "model is an object"),
        ({"method": l2l.MeZO}, "method is an object"),
        ({"method": "conservative"}, "cannot be spread over workers"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**given)
    assert not (tmp_path / "on-ray").exists()


LONG: dict[str, Any] = {"steps": 101, "batch_size": 4, "train_size": 64, "dev_size": 16, "test_size": 16}
LOST_EVERY = 20


def lose_every(monkeypatch: pytest.MonkeyPatch, kill: Callable[[RayLead], None]) -> None:
    """A worker is lost before every 20th step, once those that had been lost before are replaced."""
    undisturbed = RayLead.step

    def step(lead: RayLead, optimizer: Any, *rest: Any) -> None:
        if optimizer.steps_done and optimizer.steps_done % LOST_EVERY == 0:
            kill(lead)
        undisturbed(lead, optimizer, *rest)

    monkeypatch.setattr(RayLead, "step", step)


def check_lossy(lossy: FineTuneResult, tmp_path: Path) -> None:
    """It has the steps and the lost members that it should have, replays, and ends where runs of other seeds do that lose
    nothing: within two standard deviations of their mean, and within one of its own seed's run."""
    lost = {step: found for step, found in enumerate(missing(lossy)) if found}
    print(f"directions left out, by step: {lost}")
    assert list(lost) == [20, 40, 60, 80, 100]
    assert lossy.summary["parallel"]["lost"] == 5 and len(steps(lossy)) == LONG["steps"]
    assert replays(lossy)
    alone = {"perturb": "functional", "overwrite": True, "out": str(tmp_path / "alone")}
    own, *ends = [l2l.fine_tune(**SMALL | LONG | alone | {"seed": seed}).summary["final_loss"] for seed in range(6)]
    print(f"final loss {lossy.summary['final_loss']:.5f}, without a loss {own:.5f}, of other seeds {ends}")
    assert lossy.summary["final_loss"] < lossy.summary["initial_loss"]
    assert abs(lossy.summary["final_loss"] - mean(ends)) <= 2 * stdev(ends)
    assert abs(lossy.summary["final_loss"] - own) <= stdev(ends)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_losing_a_worker_every_20_steps_ends_within_the_spread_of_seeds(run, tmp_path: Path, monkeypatch):
    lose_every(monkeypatch, lambda lead: setattr(lead.workers[0].actor, "dead", True))
    check_lossy(run(**LONG | {"checksum_every": 10}), tmp_path)


@pytest.mark.slow  # starts a cluster, and four processes that load the model
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # of Ray, on the way out
def test_a_cluster_that_loses_a_worker_every_20_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray", reason=WHY)

    def kill(lead: RayLead) -> None:
        joining = [worker.task for worker in lead.workers if worker.task is not None]
        if joining:
            ray.wait(joining, num_returns=len(joining), timeout=1200)
        ray.kill(lead.workers[0].actor)

    lose_every(monkeypatch, kill)
    torch.set_num_threads(1)
    given = SMALL | LONG | ON_RAY | {"checksum_every": 10, "out": str(tmp_path / "on-ray"), "rank_timeout": 1200.0}
    try:
        lossy = l2l.fine_tune(**given, ray_address="local")
    finally:
        ray.shutdown()
    check_lossy(lossy, tmp_path)
