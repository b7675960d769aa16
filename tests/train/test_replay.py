"""A run is rebuilt from its log without data or forward passes, bit for bit; and a log that is not whole says so.

The kind of fault: weights are all that a run leaves, and they cannot be checked, taken back or shared in small.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import METHODS, PROBLEMS, MethodCase, TiedLM, named, optimizer_for, same_bits, weights

import l2l
from l2l.cli import main
from l2l.noise import dispatch
from l2l.optim import Logged, ZOOptimizer
from l2l.train import runlog
from l2l.train.replay import find_log, replay
from l2l.train.runlog import RunLog, StepRecord, read_log

TIED, STEPS = PROBLEMS[-1], 8
SMALL: dict[str, Any] = {
    **{"task": "world_topic", "steps": 12, "batch_size": 4, "train_size": 24, "dev_size": 8, "test_size": 8, "lr": 1e-3},
    **{"eval_every": 3, "checkpoint_every": 5, "log_every": 1, "progress": False},
}


@contextlib.contextmanager
def computed_by(backend: str, threads: int) -> Iterator[None]:
    """Noise by a backend, on a number of threads."""
    before, variable = torch.get_num_threads(), os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = backend
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop(dispatch.VARIABLE)
        if variable is not None:
            os.environ[dispatch.VARIABLE] = variable


def ran(optimizer: ZOOptimizer, closure: Any, folder: Path) -> None:
    """Some steps, with a read of the weights between them, and the log of a run."""
    log = RunLog(folder, {"epsilon": optimizer.method.epsilon})
    with optimizer.theta.fused_steps():
        for step in range(STEPS):
            if step == 5:
                optimizer.theta.restore()
            optimizer.step(closure)
            assert optimizer.report is not None
            log.append(StepRecord.of(optimizer.report, optimizer.param_groups[0]["lr"], b"abc", step == 5))
    log.close()


@pytest.mark.parametrize("case", METHODS, ids=named)
def test_every_method_is_replayed_to_the_bit_or_says_why_not(case: MethodCase, tmp_path):
    model, again = TiedLM(), TiedLM()
    optimizer = optimizer_for(case, model, TIED, seed=3)
    ran(optimizer, model, tmp_path)
    if optimizer.method.not_replayable:
        assert case.name in ("agzo", "hybrid+mezo") or case.args.get("sparse", {}).get("kind") == "wanda"
        return
    replay(read_log(tmp_path / runlog.NAME), optimizer_for(case, again, TIED, seed=3), STEPS)
    assert same_bits(weights(model), weights(again))
    assert not same_bits(weights(model), weights(TiedLM()))


@pytest.mark.parametrize("case", [case for case in METHODS if case.name in ("mezo", "adam", "learned", "fzoo")], ids=named)
@pytest.mark.parametrize(("backend", "threads"), [("native", 2), ("numba", 2), ("reference", 1)])
def test_backends_and_threads_give_the_same_bytes(case: MethodCase, backend: str, threads: int, tmp_path):
    if problem := dispatch.backend_problem(backend):
        pytest.skip(problem)
    model, again = TiedLM(), TiedLM()
    ran(optimizer_for(case, model, TIED), model, tmp_path)
    with computed_by(backend, threads):
        replay(read_log(tmp_path / runlog.NAME), optimizer_for(case, again, TIED), STEPS)
    assert same_bits(weights(model), weights(again))
