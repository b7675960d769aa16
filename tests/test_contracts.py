"""What every method owes its caller, on every problem."""

from __future__ import annotations

import gc
import inspect
import io
import pkgutil
from importlib import import_module

import pytest
import torch
from cases import METHODS, MethodCase, Problem, TiedLM, farthest, optimizer_for, same_bits, weights
from torch import Tensor, nn

import l2l.methods
from l2l.finetune.optimizer import ZOOptimizer
from l2l.methods.base import Method
from l2l.noise import standard_noise

STEPS = 7
"""Enough for two searches of DiZO at its interval here."""


@pytest.fixture(params=METHODS, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> MethodCase:
    return request.param


def trained(case: MethodCase, problem: Problem, steps: int = STEPS, seed: int = 0) -> nn.Module:
    model = problem.make()
    optimizer = optimizer_for(case, model, problem.lr, seed)
    for _ in range(steps):
        optimizer.step(model)
    return model


def test_every_method_of_the_package_is_in_the_cases():
    modules = [import_module(found.name) for found in pkgutil.iter_modules(l2l.methods.__path__, "l2l.methods.")]
    classes = {value for module in modules for _, value in inspect.getmembers(module, inspect.isclass)}
    methods = {value for value in classes if issubclass(value, Method) and not inspect.isabstract(value)}
    assert methods == {type(case.make(nn.Linear(2, 2))) for case in METHODS}


def test_it_descends(case: MethodCase, problem: Problem):
    before = problem.make()().item()
    assert trained(case, problem, problem.steps)().item() < problem.below * before


def test_two_runs_with_one_seed_are_equal_bit_for_bit_and_another_seed_differs(case: MethodCase, problem: Problem):
    first, second, other = (weights(trained(case, problem, seed=seed)) for seed in (0, 0, 1))
    assert same_bits(first, second)
    assert not same_bits(first, other)


def test_the_same_key_gives_the_same_step_whatever_was_drawn_before(case: MethodCase, problem: Problem):
    quiet, busy = problem.make(), problem.make()
    optimizer_for(case, quiet, problem.lr).step(quiet)
    optimizer_for(case, problem.make(), problem.lr, seed=9)
    torch.rand(100)
    optimizer_for(case, busy, problem.lr).step(lambda: busy() + 0 * torch.rand(1).sum())
    assert same_bits(weights(quiet), weights(busy))


def test_frozen_blocks_never_move_and_the_others_do(case: MethodCase, problem: Problem):
    model = problem.make()
    name, frozen = next(iter(model.named_parameters()))
    frozen.requires_grad_(False)
    optimizer = optimizer_for(case, model, problem.lr)
    before = weights(model)
    for _ in range(STEPS):
        optimizer.step(model)
    after = weights(model)
    assert torch.equal(before[name], after[name])
    assert all(not torch.equal(before[other], after[other]) for other in before if other != name)


def test_the_global_random_state_stays_untouched(case: MethodCase, problem: Problem):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(case, problem)
    assert torch.equal(before, torch.get_rng_state())


def test_no_gradient_is_left_behind_and_requires_grad_stays(case: MethodCase, problem: Problem):
    model = trained(case, problem)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_loss_it_returns_is_a_float_near_the_loss_at_theta(case: MethodCase, problem: Problem):
    model = problem.make()
    at_theta = model().item()
    loss = optimizer_for(case, model, problem.lr).step(model)
    assert isinstance(loss, float)
    assert loss == pytest.approx(at_theta, rel=1e-2)


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FloatingPointError])
def test_theta_is_back_where_the_step_began_when_the_closure_raises(
    case: MethodCase, problem: Problem, error: type[BaseException], failing_call: int
):
    model = problem.make()
    optimizer = optimizer_for(case, model, problem.lr)
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


def test_a_run_saved_half_way_continues_bit_for_bit(case: MethodCase, problem: Problem):
    model = trained(case, problem, 0)
    optimizer = optimizer_for(case, model, problem.lr)
    for _ in range(4):
        optimizer.step(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(5):
        optimizer.step(model)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = problem.make()
    again = optimizer_for(case, resumed, lr=123.0, seed=99)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(5):
        again.step(resumed)
    assert same_bits(weights(model), weights(resumed))


def test_it_moves_along_the_directions_it_looked_along(case: MethodCase, problem: Problem):
    """In every method the first step, before any search, lies in the span of what was looked at, block by block."""
    model = problem.make().double()
    start, looked = weights(model), []

    def watched() -> Tensor:
        looked.append(weights(model))
        return model()

    optimizer_for(case, model, problem.lr).step(watched)
    end = weights(model)
    flat = {name: torch.stack([(look[name] - start[name]).flatten() for look in looked[::2]], 1) for name in start}
    whole = torch.cat(list(flat.values()))
    moved = torch.cat([(end[name] - start[name]).flatten() for name in start])
    found = torch.linalg.lstsq(whole, moved[:, None]).solution
    assert torch.linalg.vector_norm(moved) > 0
    assert torch.linalg.vector_norm(whole @ found - moved[:, None]) < 1e-8 * torch.linalg.vector_norm(moved)


def live_storages() -> dict[int, int]:
    """Bytes of every tensor memory alive, by address."""
    gc.collect()
    plain = (Tensor, nn.Parameter)  # those that a compiler traces with have no memory
    tensors = [value for value in gc.get_objects() if type(value) in plain and value.device.type != "meta"]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_it_keeps_no_more_memory_than_it_declares(case: MethodCase):
    model = TiedLM()
    method = case.make(model)
    before = live_storages()
    optimizer = ZOOptimizer(model, method, lr=0.01)
    for _ in range(STEPS):
        optimizer.step(model)
    after = live_storages()
    assert sum(size for address, size in after.items() if address not in before) == case.state_bytes(optimizer.blocks)


@pytest.mark.parametrize("case", [case for case in METHODS if case.projects], ids=lambda case: case.name, indirect=True)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_search_undoes_the_update_as_well(case: MethodCase, problem: Problem, error: type[BaseException]):
    model = problem.make()
    optimizer = optimizer_for(case, model, problem.lr)
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


def test_tied_weights_move_once(case: MethodCase):
    model = TiedLM().double()
    optimizer = optimizer_for(case, model, lr=0.01)
    before = weights(model)
    optimizer.step(model)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in optimizer.blocks.names
    assert optimizer.report is not None
    moved = torch.zeros_like(before["embed.weight"])
    for seen in optimizer.report.estimates:
        u = seen.direction
        z = standard_noise("embed.weight", u.key, moved.shape, u.distribution, torch.float64)
        sigma = u.factor * u.sigma[optimizer.blocks.names.index("embed.weight")]
        moved -= 0.01 * seen.projected_gradient * sigma * z / len(optimizer.report.estimates)
    torch.testing.assert_close(model.embed.weight.detach() - before["embed.weight"], moved, rtol=1e-8, atol=1e-14)
