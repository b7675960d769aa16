"""Closures that ranks share: every method makes the step of one process, and ranks that part are found."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import closing
from typing import Any

import pytest
import torch
from cases import TiedLM
from rank_threads import ranks_of, started, together

from l2l.estimators import Closure, MicroBatched
from l2l.methods import is_first_order, method_names
from l2l.methods.registry import build_method
from l2l.optim import ZOOptimizer
from l2l.parallel import DataParallel, Ranks, ranks_of_environment
from l2l.parallel.ranks import RankError, RunFinished

PIECES, WEIGHTS = 4, (0.1, 0.2, 0.3, 0.4)
METHODS = [name for name in method_names() if not is_first_order(name) and name not in ("learned", "agzo", "forward_grad")]
"""All but those that read activations or derivatives of the rows, which ranks do not exchange."""

MAKING = threading.Lock()
FEWER = {name: {"num_directions": 4} for name in ("es", "rsgn", "subzero_plus")}


def pieces(model: Any, step: int) -> MicroBatched:
    """Losses of four parts of a batch."""

    def piece(part: int) -> Closure:
        return lambda: model() * (1 + 0.1 * part + 0.01 * step)

    return MicroBatched(tuple(map(piece, range(PIECES))), WEIGHTS)


def made(name: str, lr: float | str = 1e-3) -> tuple[TiedLM, ZOOptimizer]:
    with MAKING:  # its weights are drawn from the process's one generator
        model = TiedLM()
    return model, ZOOptimizer(model, build_method(name, 1e-3, FEWER.get(name, {}), None, model), lr)  # type: ignore[arg-type]


def run(name: str, ranks: Ranks | None, steps: int = 3, **options: Any) -> list[torch.Tensor]:
    model, one = made(name, **options)
    shared = ranks and DataParallel(ranks)
    for step in range(steps):
        closure, other = pieces(model, step), pieces(model, step + 1)
        if shared is None:
            one.step(closure, lambda _, other=other: other)
        else:
            shared.begin(step)
            one.step(shared.joint(closure), lambda _, other=shared.joint(other): other)
    return [block.tensor.detach().clone() for block in one.blocks]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_two_ranks_has_the_bits_of_one_process(name: str):
    alone, both = run(name, None), together(2, lambda ranks: run(name, ranks))
    if name == "pseuzo":  # reads the model's outputs where it can; of losses from elsewhere it is the one-sided estimate
        alone = both[0]
    assert all(all(map(torch.equal, alone, one)) for one in both)


@pytest.mark.parametrize("size", [3, 6])
def test_more_ranks_than_pieces_and_shares_of_unequal_size(size: int):
    assert all(all(map(torch.equal, run("mezo", None), one)) for one in together(size, lambda ranks: run("mezo", ranks)))


def test_lr_auto_on_two_ranks_has_the_bits_of_one_process():
    alone, both = run("mezo", None, 8, lr="auto"), together(2, lambda ranks: run("mezo", ranks, 8, lr="auto"))
    assert all(all(map(torch.equal, alone, one)) for one in both)


def test_messages_of_steps_that_are_over_are_forgotten():
    ranks = ranks_of(2)
    waiting = [started(lambda one=one: run("mezo", one, 20)) for one in ranks]
    for one in waiting:
        one.result(30)
    assert ranks[0]._store.num_keys() <= 12  # two evaluations of two ranks of two steps, and what the store has by itself


@pytest.mark.parametrize("weights", [None, (0.25, 0.75)])
@pytest.mark.parametrize("kind", ["scalar", "per example", "logits"])
def test_a_loop_of_ones_own_shares_its_loss(kind: str, weights: tuple[float, ...] | None):
    rows = torch.arange(8.0)
    targets = torch.tensor([0, 1, 0, 1])

    def value(part: torch.Tensor) -> Any:
        if kind == "scalar":
            return part.mean()
        return part if kind == "per example" else (part.reshape(-1, 2), targets[: len(part) // 2])

    def call(ranks: Ranks) -> Any:
        own = rows[:4] if ranks.rank == 0 else rows[4:]
        return DataParallel(ranks).shard(lambda: value(own), weights)()

    first, second = together(2, call)
    shares = weights or (0.5, 0.5)
    expected: Any = MicroBatched((lambda: value(rows[:4]), lambda: value(rows[4:])), shares)()
    for found in (first, second):
        same = zip(found, expected, strict=True) if kind == "logits" else [(torch.as_tensor(found), expected)]
        assert all(torch.equal(a, b) for a, b in same)


def test_weights_of_another_number_of_ranks_are_refused():
    with pytest.raises(ValueError, match="1 weights for 2 ranks: give one for each"):
        DataParallel(ranks_of(2)[0]).shard(lambda: 1.0, (1.0,))


def test_a_rank_whose_weights_differ_in_one_bit_is_named():
    def call(ranks: Ranks) -> None:
        _model, one = made("mezo")
        shared = DataParallel(ranks)
        shared.begin(0)
        shared.compare(one)
        if ranks.rank == 1:
            with torch.no_grad():
                flat = one.blocks[0].flat
                flat[0] = torch.nextafter(flat[0], torch.tensor(9.0, dtype=flat.dtype))
        shared.begin(1)
        shared.compare(one)

    waiting = [started(lambda one=one: call(one)) for one in ranks_of(2)]
    for one in waiting:
        with pytest.raises(ValueError, match="before step 0 the weights of rank 1 differ from those of rank 0"):
            one.result(30)


def test_a_rank_that_does_not_come_and_one_that_has_failed_are_named():
    with pytest.raises(RankError, match=r"rank 1 has not sent '0\.0\.1' for"):
        run("mezo", ranks_of(2, timeout=0.05)[0])
    ranks = ranks_of(2)
    with pytest.raises(ZeroDivisionError), ranks[1].failing():
        _ = 1 / 0
    with pytest.raises(RankError, match="rank 1 has failed: division by zero"):
        run("mezo", ranks[0])


def test_an_end_is_told_and_an_error_of_rank_0_too():
    ranks = ranks_of(2)
    ending = started(lambda: ranks[0].end([1]))
    with pytest.raises(RunFinished):
        ranks[1].collect("never")
    ranks[1].leave(b"bye")
    assert ending.result(30) == {1: b"bye"}
    ranks = ranks_of(2)
    ranks[0].fail(ValueError("no room"))
    with pytest.raises(RankError, match="rank 0 has ended the run: no room"):
        ranks[1].collect("never")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not: set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "must be whole numbers"),
    ],
)
def test_an_environment_that_is_incomplete_is_named(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], text: str):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment() is None
    for name, value in given.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(ValueError, match=text):
        ranks_of_environment()


def test_the_whole_environment_gives_ranks_that_reach_each_other(monkeypatch: pytest.MonkeyPatch):
    with closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setitem(os.environ, name, value)
    first = ranks_of_environment()
    monkeypatch.setitem(os.environ, "RANK", "1")
    second = ranks_of_environment()
    assert first is not None and second is not None
    second.post("key", b"value")
    assert first.collect("key") == b"value"
    assert [first.add("count", 1), second.add("count", 1)] == [1, 2]
    second.delete(["key"])
    assert not first.there("key")


def test_a_rank_beyond_the_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="RANK=2 must be at least 0 and below WORLD_SIZE=2"):
        Ranks(2, 2, None)
