"""A run of several ranks: the weights of one process, whoever is killed, comes late or goes; its log replays."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import PATIENCE, ranks_of, started

from l2l.parallel import Ranks
from l2l.parallel.ranks import RankError
from l2l.train import replay, several, trainer
from l2l.train.config import FineTuneConfig
from l2l.train.runlog import read_log
from l2l.train.trainer import FineTuneResult, plan_and_run

pytestmark = pytest.mark.in_turn

SMALL: dict[str, Any] = {"batch_size": 4, "train_size": 8, "dev_size": 4, "test_size": 4, "steps": 5, "lr": 1e-4}
SMALL |= {"progress": False, "checksum_every": 2}
POPULATION: dict[str, Any] = {"method": "mezo", "num_directions": 4, "parallel": "population", "lr": 1e-4}
"""With ``perturb="functional"`` in place of ``parallel``, the run of one process."""
ALONE = {**POPULATION, "parallel": None, "perturb": "functional"}
here = threading.local()
MAKING = threading.Lock()


@pytest.fixture(autouse=True)
def ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_thread(timeout: float) -> Ranks | None:
        found = getattr(here, "ranks", None)
        if found is not None:
            found.timeout = timeout
        return found

    made = trainer.prepare_fine_tuning

    def one_by_one(*args: Any, **options: Any) -> Any:
        with MAKING:  # libraries load models with switches of the process
            return made(*args, **options)

    monkeypatch.setattr(several, "ranks_of_environment", of_thread)
    monkeypatch.setattr(trainer, "prepare_fine_tuning", one_by_one)


def run(out: Path, ranks: Ranks | None = None, **options: Any) -> FineTuneResult:
    here.ranks = ranks
    return plan_and_run(FineTuneConfig(**{**SMALL, "out": str(out), **options}))


def begin(out: Path, ranks: Ranks, **options: Any) -> Future[FineTuneResult]:
    return started(lambda: run(out, ranks, **options))


def weights(result: FineTuneResult) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in result.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def last(out: Path) -> dict[str, torch.Tensor]:
    """The last weights of a run, from its log."""
    return dict(replay.rebuild(read_log(out / "steps.l2l"), to="last").named_parameters())


def evaluations(out: Path) -> list[tuple[float, ...]]:
    return [step.losses for step in read_log(out / "steps.l2l").steps]


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch": 1},
        pytest.param({"micro_batch": 2, "lr": "auto", "schedule": "linear"}, marks=pytest.mark.slow),
        pytest.param({"micro_batch": 2, "method": "dizo", "method_args": {"interval": 3}}, marks=pytest.mark.slow),
        pytest.param({"micro_batch": 2, "objective": "accuracy"}, marks=pytest.mark.slow),
    ],
    ids=["mezo", "auto", "dizo", "accuracy"],
)
def test_two_data_parallel_ranks_have_the_bits_of_one(tmp_path: Path, options: dict[str, Any]):
    run(tmp_path / "alone", parallel="data", **options)
    ranks = ranks_of(2)
    follower = begin(tmp_path / "none", ranks[1], **options)
    lead = run(tmp_path / "both", ranks[0], **options)
    assert evaluations(tmp_path / "alone") == evaluations(tmp_path / "both")
    assert same(last(tmp_path / "alone"), weights(follower.result(PATIENCE)))
    assert same(last(tmp_path / "both"), weights(follower.result()))
    assert not (tmp_path / "none").exists()
    sent = lead.summary["parallel"]["sent"]
    assert sorted(sent) == ["0", "1"]
    assert all(one["checksums"] == 2 * 8 for one in sent.values())  # before steps 2 and 4


def test_bytes_per_direction_are_few(tmp_path: Path):
    ranks = ranks_of(2)
    follower = begin(tmp_path / "none", ranks[1])
    sent = run(tmp_path / "both", ranks[0]).summary["parallel"]["sent"]
    follower.result(PATIENCE)
    assert sent["1"]["per_step"] == 2 * 5  # two float32 losses, each with a byte that says so
    assert sent["0"]["per_step"] == 2 * 5 + 9  # and the learning rate
    assert sum(sent["0"][name] for name in ("per_step", "log_per_step")) <= 64 + 2000 / SMALL["steps"]  # the log's header once


@pytest.mark.parametrize(
    "extra",
    [
        {},
        pytest.param({"method": "rsgn", "lr": 1.0}, marks=pytest.mark.slow),
        pytest.param({"estimator": "one_sided"}, marks=pytest.mark.slow),
    ],
    ids=["mezo", "rsgn", "one_sided"],
)
def test_a_population_of_two_has_the_bits_of_one_process(tmp_path: Path, extra: dict[str, Any]):
    run(tmp_path / "alone", **{**ALONE, **extra})
    ranks = ranks_of(2)
    follower = begin(tmp_path / "none", ranks[1], **{**POPULATION, **extra})
    run(tmp_path / "both", ranks[0], **{**POPULATION, **extra})
    assert evaluations(tmp_path / "alone") == evaluations(tmp_path / "both")
    assert same(last(tmp_path / "alone"), weights(follower.result(PATIENCE)))
    assert same(last(tmp_path / "both"), weights(follower.result()))


class Killed(BaseException):
    """Ends a rank as kill -9 does: it tells nobody."""


def killed_at(monkeypatch: pytest.MonkeyPatch, rank: int, step: int, then: Callable[[], None] = lambda: None) -> None:
    """The rank is killed in its first evaluation of a step; ``then`` is called before it is gone."""
    of_step, told, waiting = trainer.Closures.at, Ranks.fail, [True]

    def at(self: Any, number: int) -> Any:
        ranks = getattr(here, "ranks", None)
        if ranks is not None and ranks.rank == rank and number == step and MAKING.locked() is False and waiting:
            waiting.clear()
            then()
            raise Killed
        return of_step(self, number)

    def fail(self: Ranks, error: BaseException) -> None:
        if not isinstance(error, Killed):
            told(self, error)

    monkeypatch.setattr(trainer.Closures, "at", at)
    monkeypatch.setattr(Ranks, "fail", fail)


def test_a_data_parallel_rank_that_is_killed_and_started_again_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ranks, again = ranks_of(2), []
    killed_at(monkeypatch, 1, 3, lambda: again.append(begin(tmp_path / "none", Ranks(1, 2, ranks[1]._store))))
    first = begin(tmp_path / "none", ranks[1])
    run(tmp_path / "both", ranks[0])
    with pytest.raises(Killed):
        first.result(PATIENCE)
    assert same(last(tmp_path / "both"), weights(again[0].result(PATIENCE)))
    monkeypatch.undo()
    here.ranks = None
    run(tmp_path / "alone", parallel="data", micro_batch=2)
    assert evaluations(tmp_path / "alone") == evaluations(tmp_path / "both")


@pytest.mark.slow
def test_a_population_goes_on_without_a_worker_and_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    options = {**POPULATION, "steps": 30, "rank_timeout": 0.5}
    ranks, again = ranks_of(3), []
    killed_at(monkeypatch, 2, 3, lambda: again.append(begin(tmp_path / "none", Ranks(2, 3, ranks[2]._store), **options)))
    others = [begin(tmp_path / "none", one, **options) for one in ranks[1:]]
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "out", ranks[0], **options)
    with pytest.raises(Killed):
        others[1].result(PATIENCE)
    assert "goes on without directions" in caplog.text
    records = read_log(tmp_path / "out" / "steps.l2l").steps
    assert [len(step.readings[0]) for step in records].count(0) < len(records)  # some were left out, and the log says which
    rebuilt = last(tmp_path / "out")
    assert same(rebuilt, weights(others[0].result(PATIENCE)))
    assert same(rebuilt, weights(again[0].result(PATIENCE)))


def test_a_worker_waits_for_rank_0_while_it_evaluates_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options, ranks, took = {**POPULATION, "rank_timeout": 0.2}, ranks_of(2), several.PopulationLead.step

    def stepped(self: Any, optimizer: Any, *args: Any) -> None:
        time.sleep(1.0 if optimizer.steps_done == 3 else 0.0)  # longer than it waits for a worker
        took(self, optimizer, *args)

    monkeypatch.setattr(several.PopulationLead, "step", stepped)
    worker = begin(tmp_path / "none", ranks[1], **options)
    run(tmp_path / "out", ranks[0], **options)
    assert same(last(tmp_path / "out"), weights(worker.result(PATIENCE)))


@pytest.mark.slow
def test_a_worker_may_come_when_the_run_is_under_way(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ranks, late = ranks_of(2), []
    took, step = several.PopulationLead.step, {"n": 0}

    def stepped(self: Any, *args: Any) -> None:
        if step["n"] == 3:
            late.append(begin(tmp_path / "none", ranks[1], **POPULATION, steps=30))
        step["n"] += 1
        took(self, *args)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(several.PopulationLead, "step", stepped)
        run(tmp_path / "out", ranks[0], **POPULATION, steps=30)
    assert same(last(tmp_path / "out"), weights(late[0].result(PATIENCE)))
    run(tmp_path / "alone", **ALONE, steps=30)
    assert evaluations(tmp_path / "alone") == evaluations(tmp_path / "out")  # nobody was left out, whoever evaluated


@pytest.mark.slow
def test_rank_0_continues_from_its_checkpoint_and_the_others_replay_its_log(tmp_path: Path):
    run(tmp_path / "whole", micro_batch=2, parallel="data")
    ranks, steps = ranks_of(2), [0]
    follower = begin(tmp_path / "none", ranks[1], checkpoint_every=2)
    took = several.DataLead.step

    def stepped(self: Any, *args: Any) -> None:
        steps[0] += 1
        if steps[0] == 4:
            raise Killed
        took(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several.DataLead, "step", stepped)
        with pytest.raises(Killed):
            run(tmp_path / "both", ranks[0], checkpoint_every=2)
    with pytest.raises(RankError, match="rank 0 has ended the run"):
        follower.result(PATIENCE)
    ranks = ranks_of(2)
    follower = begin(tmp_path / "none", ranks[1], checkpoint_every=2)
    run(tmp_path / "both", ranks[0], checkpoint_every=2)
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "both")
    assert same(last(tmp_path / "whole"), weights(follower.result(PATIENCE)))


@pytest.mark.parametrize("parallel", ["data", "population"])
def test_weights_that_part_are_found_at_the_next_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str):
    take = several.take_again if parallel == "population" else several._step_on_data

    def damaged(*args: Any) -> None:
        take(*args)
        optimizer = args[0] if parallel == "population" else args[1]
        if here.ranks.rank == 1 and optimizer.steps_done == 1:
            optimizer.theta.restore()
            with torch.no_grad():
                optimizer.blocks[0].flat[0] += 1e-3

    name = "take_again" if parallel == "population" else "_step_on_data"
    monkeypatch.setattr(several, name, damaged)
    options = POPULATION | {"steps": 20} if parallel == "population" else {}
    ranks = ranks_of(2)
    follower = begin(tmp_path / "none", ranks[1], **options)
    with pytest.raises(ValueError, match=r"before step \d+ the weights of rank 1 differ from those of rank 0"):
        run(tmp_path / "both", ranks[0], **options)
    with pytest.raises((ValueError, RankError), match="the weights of rank 1 differ"):
        follower.result(PATIENCE)


def test_ranks_that_run_something_else_are_refused(tmp_path: Path):
    ranks = ranks_of(2)
    follower = begin(tmp_path / "none", ranks[1], epsilon=1e-2)
    with pytest.raises(RankError, match=r"rank 1 has failed: .*epsilon is 0\.01 here and 0\.001 there"):
        run(tmp_path / "both", ranks[0], epsilon=1e-3)
    with pytest.raises(ValueError, match=r"rank 1 runs something else than rank 0: .*epsilon is 0\.01 here"):
        follower.result(PATIENCE)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "agzo"}, "cannot be shared by several processes"),
        ({"method": "adamw", "lr": 1e-5}, "cannot be shared by several processes"),
        ({"method": "zero_shot"}, "takes no steps that ranks could share"),
        ({"loop": "lightning"}, "loop='lightning' is of one process"),
        ({"prefix_cache": "disk"}, "prefix_cache='disk' is of one process"),
        ({"parallel": "population"}, "set --num_directions"),
        ({"parallel": "population", "method": "dizo", "num_directions": 4}, "use --parallel data"),
        ({"parallel": "population", "num_directions": 4, "perturb": "in_place"}, "use perturb='functional'"),
        ({"objective": "json:dumps"}, "use --parallel population"),
    ],
)
def test_what_several_ranks_cannot_run_is_refused_before_the_first_step(tmp_path: Path, options: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        run(tmp_path / "out", ranks_of(2)[0], **options)
    assert not (tmp_path / "out").exists()


def test_a_population_of_one_process_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="needs several processes, and this is one"):
        run(tmp_path / "out", **POPULATION)
    run(tmp_path / "out", **ALONE, steps=1)


def test_what_several_ranks_cannot_run_runs_in_one_process(tmp_path: Path):
    with pytest.raises(ValueError, match="use one of forward passes alone, such as mezo, or run it in one process"):
        run(tmp_path / "out", ranks_of(2)[0], method="agzo")
    run(tmp_path / "out", method="agzo", steps=1)
