"""What every method owes its caller, on every problem.

The whole grid of cases x problems is slow. By default every case is tested on the smallest problem by the core tests, and a
slice of the rest is drawn by the date.
"""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from cases import (
    METHODS,
    PROBLEMS,
    MethodCase,
    Problem,
    TiedLM,
    farthest,
    named,
    optimizer_for,
    same_bits,
    weights,
)
from daily import daily_slice
from torch import Tensor, nn

from l2l.methods.base import CustomEstimator, Method
from l2l.optim import ZOOptimizer
from l2l.params import dense_direction

Test: TypeAlias = Callable[..., Any]
TIED = PROBLEMS[-1]
STEPS = 7
"""Enough for two searches of DiZO at its interval here."""
DIZO = [case for case in METHODS if case.name == "dizo"]


GRID = [(case, problem) for problem in PROBLEMS for case in METHODS]
"""The first third is every method on the smallest problem."""


def grid(core: bool = False, cases: Sequence[MethodCase] = METHODS) -> Callable[[Test], Test]:
    """Every case on every problem: all but a slice slow, and of ``core`` tests those on the first problem never."""
    pairs = [pair for pair in GRID if pair[0] in cases]
    values = daily_slice(pairs, 5, pairs[: len(cases)] if core else (), lambda case, one: f"{one.name}-{named(case)}")
    return pytest.mark.parametrize(("case", "problem"), values)


def each_method(test: Test) -> Test:
    """Every case on the test's own problem: all but a few slow."""
    return pytest.mark.parametrize("case", daily_slice(METHODS, 5, name=named))(test)


def trained(case: MethodCase, problem: Problem, steps: int = STEPS, seed: int = 0) -> nn.Module:
    model = problem.make()
    optimizer = optimizer_for(case, model, problem, seed)
    for _ in range(steps):
        optimizer.step(model)
    return model


@grid()
def test_it_descends(case: MethodCase, problem: Problem):
    before = problem.make()().item()
    assert trained(case, problem, problem.steps)().item() < problem.below * before


@grid(core=True)
def test_two_runs_with_one_seed_are_equal_bit_for_bit_and_another_seed_differs(case: MethodCase, problem: Problem):
    first, second, other = (weights(trained(case, problem, seed=seed)) for seed in (0, 0, 1))
    assert same_bits(first, second)
    assert not same_bits(first, other)


@pytest.mark.filterwarnings("ignore:the closure draws random numbers")
@grid()
def test_the_same_key_gives_the_same_step_whatever_was_drawn_before(case: MethodCase, problem: Problem):
    quiet, busy = problem.make(), problem.make()
    optimizer_for(case, quiet, problem).step(quiet)
    optimizer_for(case, problem.make(), problem, seed=9)
    torch.rand(100)
    optimizer_for(case, busy, problem).step(lambda: busy() + 0 * torch.rand(1).sum())
    assert same_bits(weights(quiet), weights(busy))


@grid()
def test_frozen_blocks_never_move_and_the_others_do(case: MethodCase, problem: Problem):
    model = problem.make()
    name, frozen = next(iter(model.named_parameters()))
    frozen.requires_grad_(False)
    optimizer = optimizer_for(case, model, problem)
    before = weights(model)
    for _ in range(40):  # a method may move some of the blocks at a time
        optimizer.step(model)
    after = weights(model)
    assert torch.equal(before[name], after[name])
    assert all(not torch.equal(before[other], after[other]) for other in before if other != name)


@grid()
def test_the_global_random_state_stays_untouched(case: MethodCase, problem: Problem):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(case, problem)
    assert torch.equal(before, torch.get_rng_state())


@grid()
def test_no_gradient_is_left_behind_and_requires_grad_stays(case: MethodCase, problem: Problem):
    model = trained(case, problem)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@grid(core=True)
def test_the_loss_it_returns_is_a_float_near_the_loss_at_theta(case: MethodCase, problem: Problem):
    model = problem.make()
    at_theta = model().item()
    loss = optimizer_for(case, model, problem).step(model)
    assert isinstance(loss, float)
    assert loss == pytest.approx(at_theta, rel=1e-2)


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FloatingPointError])
@grid(core=True)
def test_theta_is_back_where_the_step_began_when_the_closure_raises(
    case: MethodCase, problem: Problem, error: type[BaseException], failing_call: int
):
    model = problem.make()
    optimizer = optimizer_for(case, model, problem)
    optimizer.step(model)
    before, state, calls = weights(model), optimizer.method_state, 0

    def failing() -> Tensor | float:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            if error is FloatingPointError:
                return float("nan")
            raise error("out of something")
        return model()

    with pytest.raises(error):
        optimizer.step(failing)
    assert farthest(before, weights(model)) < 1e-6
    assert optimizer.method_state is state
    assert optimizer.steps_done == 1
    optimizer.step(model)


@grid(core=True)
def test_a_run_saved_half_way_continues_bit_for_bit(case: MethodCase, problem: Problem):
    model = trained(case, problem, 0)
    optimizer = optimizer_for(case, model, problem)
    for _ in range(4):
        optimizer.step(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(5):
        optimizer.step(model)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = problem.make()
    again = optimizer_for(case, resumed, replace(problem, lr=123.0, own_lr=123.0), seed=99)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(5):
        again.step(resumed)
    assert same_bits(weights(model), weights(resumed))


@grid(core=True)
def test_it_moves_along_the_directions_it_evaluated(case: MethodCase, problem: Problem):
    """The first step, before any search, lies in the span of the points that were evaluated."""
    model = problem.make().double()
    if case.make(model).leaves_span:
        pytest.skip("the method changes coordinates one by one: its step is held against a dense one instead")
    start, points = weights(model), []

    def watched() -> Tensor:
        points.append(weights(model))
        return model()

    optimizer = optimizer_for(case, model, problem)
    optimizer.step(watched)
    end = weights(model)
    flat = {name: torch.stack([(point[name] - start[name]).flatten() for point in points], 1) for name in start}
    whole = torch.cat(list(flat.values()))
    if not whole.any():  # seen from theta itself: the directions are those of the estimates
        assert optimizer.report is not None
        blocks, seen = optimizer.blocks, optimizer.report.estimates
        us = [torch.cat([dense_direction(e.direction, blocks, i).flatten() for i in range(len(blocks))]) for e in seen]
        whole = torch.stack(us, 1)
    moved = torch.cat([(end[name] - start[name]).flatten() for name in start])
    found = torch.linalg.lstsq(whole, moved[:, None], driver="gelsd").solution
    assert torch.linalg.vector_norm(moved) > 0
    assert torch.linalg.vector_norm(whole @ found - moved[:, None]) < 1e-8 * torch.linalg.vector_norm(moved)


def live_storages() -> dict[int, int]:
    """Bytes of every tensor memory alive, by address."""
    gc.collect()
    plain = (Tensor, nn.Parameter)  # those that a compiler traces with have no memory
    tensors = [
        value
        for value in gc.get_objects()
        if type(value) in plain and value.device.type != "meta" and value.layout == torch.strided
    ]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@each_method
def test_it_holds_no_more_memory_than_it_declares(case: MethodCase):
    model = TiedLM()
    method = case.make(model)
    before = live_storages()
    optimizer = ZOOptimizer(model, method, lr=0.01)
    for _ in range(STEPS):
        optimizer.step(model)
    after = live_storages()
    more = sum(size for address, size in after.items() if address not in before)
    assert more <= method.state_bytes(optimizer.blocks) + method.scratch_bytes(optimizer.blocks)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@grid(cases=DIZO)
def test_an_error_in_a_search_undoes_the_update_as_well(case: MethodCase, problem: Problem, error: type[BaseException]):
    model = problem.make()
    optimizer = optimizer_for(case, model, problem)
    for _ in range(2):
        optimizer.step(model)
    before, calls = weights(model), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error("in the search")
        return model()

    with pytest.raises(error):
        optimizer.step(failing)
    assert calls == 4
    assert farthest(before, weights(model)) < 1e-6


@each_method
def test_tied_weights_move_once(case: MethodCase):
    model = TiedLM().double()
    optimizer = optimizer_for(case, model, TIED)
    before = weights(model)
    optimizer.step(model)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in optimizer.blocks.names
    assert optimizer.report is not None
    method = optimizer.method
    assert isinstance(method, Method)
    if method.state_bytes(optimizer.blocks) or method.step_is_normalized or isinstance(method, CustomEstimator):
        pytest.skip("how far it moves depends on more than the estimates: its step is held against a dense one instead")
    moved = torch.zeros_like(before["embed.weight"])
    for seen in optimizer.report.estimates:
        u = dense_direction(seen.direction, optimizer.blocks, optimizer.blocks.names.index("embed.weight"))
        moved -= TIED.lr * seen.projected_gradient * u / len(optimizer.report.estimates)
    torch.testing.assert_close(model.embed.weight.detach() - before["embed.weight"], moved, rtol=1e-8, atol=1e-14)


@pytest.mark.filterwarnings("ignore:no loss has changed")  # the loss is rounded to bfloat16
@each_method
def test_half_precision_weights_are_trained(case: MethodCase):
    model = TiedLM().bfloat16()
    before = weights(model)
    optimizer = optimizer_for(case, model, TIED)
    for _ in range(40):
        assert math.isfinite(optimizer.step(lambda: model().float()))
    assert all(not torch.equal(before[name], after) for name, after in weights(model).items())


@grid()
def test_a_managed_loop_takes_the_same_steps(case: MethodCase, problem: Problem):
    plain, inside = problem.make().double(), problem.make().double()
    left, right = optimizer_for(case, plain, problem), optimizer_for(case, inside, problem)
    for _ in range(STEPS):
        left.step(plain)
    with right.theta.fused_steps():
        for _ in range(STEPS):
            right.step(inside)
    assert farthest(weights(plain), weights(inside)) < 1e-9
