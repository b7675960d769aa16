"""In a managed loop a step takes two traversals, and nothing else about it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    ALONG_NOISE,
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
from torch import Tensor

import l2l.params.engine
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, Direction, PerturbedParameters

pytestmark = pytest.mark.in_turn


@pytest.fixture
def traversals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each traversal that writes had."""
    seen: list[int] = []
    genuine = l2l.params.engine.add_noise

    def counting(pieces: Any, *rest: Any, **named: Any) -> Any:
        if pieces and named.get("store", True):
            seen.append(len(pieces))
        return genuine(pieces, *rest, **named)

    monkeypatch.setattr(l2l.params.engine, "add_noise", counting)
    return seen


def run(case: MethodCase, problem: Problem, steps: int, managed: bool) -> tuple[list[float], dict[str, Tensor]]:
    model = problem.make()
    optimizer = optimizer_for(case, model, problem)
    losses: list[float] = []

    def loop() -> None:
        losses.extend(optimizer.step(model) for _ in range(steps))

    if managed:
        with optimizer.theta.fused_steps():
            loop()
    else:
        loop()
    return losses, weights(model)


@pytest.mark.parametrize("case", ALONG_NOISE, ids=named)
def test_fifty_merged_steps_equal_plain_ones_bit_for_bit(case: MethodCase, problem: Problem):
    plain, merged = (run(case, problem, 50, managed) for managed in (False, True))
    assert plain[0] == merged[0]
    assert same_bits(plain[1], merged[1])


@pytest.mark.parametrize("name", ["mezo", "learned"])
def test_a_merged_step_takes_two_traversals_and_a_plain_one_three(name: str, traversals: list[int]):
    case = next(case for case in METHODS if case.name == name)
    model = TiedLM()
    optimizer = optimizer_for(case, model, PROBLEMS[-1])
    optimizer.step(model)
    assert len(traversals) == 3
    with optimizer.theta.fused_steps():
        optimizer.step(model)
        traversals.clear()
        for _ in range(5):
            optimizer.step(model)
        assert len(traversals) == 10
        assert not optimizer.theta.displacement.restored
    assert optimizer.theta.displacement.restored


def test_home_can_be_visited_in_the_middle_without_changing_a_bit():
    ends = []
    for visits in (False, True):
        model = TiedLM()
        optimizer = ZOOptimizer(model, MeZO(), lr=0.01)
        with optimizer.theta.fused_steps():
            for _ in range(6):
                optimizer.step(model)
                if visits:
                    optimizer.theta.restore()
                    assert optimizer.theta.displacement.restored
        ends.append(weights(model))
    assert same_bits(*ends)


def test_the_displacement_tells_where_memory_stands_and_what_waits():
    model = TiedLM()
    optimizer = ZOOptimizer(model, MeZO(epsilon=1e-2), lr=0.01)
    with optimizer.theta.fused_steps():
        optimizer.step(model)
        displacement = optimizer.theta.displacement
        assert optimizer.report is not None
        seen = optimizer.report.estimates[0]
        assert (displacement.direction, displacement.distance) == (seen.direction, -1e-2)
        (move,) = displacement.pending
        assert move.direction == seen.direction
        assert set(move.amounts) == {-0.01 * seen.projected_gradient}


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_error_in_a_managed_step_leaves_what_the_steps_before_it_reached(failing_call: int):
    model, plain = TiedLM(), TiedLM()
    optimizer, other = ZOOptimizer(model, MeZO(), lr=0.01), ZOOptimizer(plain, MeZO(), lr=0.01)
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise RuntimeError("out of something")
        return model()

    for _ in range(2):
        other.step(plain)
    with optimizer.theta.fused_steps():
        for _ in range(2):
            optimizer.step(model)
        with pytest.raises(RuntimeError, match="out of something"):
            optimizer.step(failing)
        assert optimizer.theta.displacement.restored
        assert farthest(weights(model), weights(plain)) < 1e-6
        assert optimizer.steps_done == 2


def test_an_error_between_steps_leaves_the_model_at_theta():
    model, plain = TiedLM(), TiedLM()
    optimizer, other = ZOOptimizer(model, MeZO(), lr=0.01), ZOOptimizer(plain, MeZO(), lr=0.01)
    other.step(plain)
    with pytest.raises(OSError, match="disk full"), optimizer.theta.fused_steps():
        optimizer.step(model)
        raise OSError("disk full")
    assert same_bits(weights(model), weights(plain))


def test_a_state_dict_brings_theta_home_first():
    model, plain = TiedLM(), TiedLM()
    optimizer, other = ZOOptimizer(model, MeZO(), lr=0.01), ZOOptimizer(plain, MeZO(), lr=0.01)
    other.step(plain)
    with optimizer.theta.fused_steps():
        optimizer.step(model)
        optimizer.state_dict()
        assert same_bits(weights(model), weights(plain))


def test_an_error_before_the_first_look_keeps_the_move_that_waits():
    model, plain = TiedLM(), TiedLM()
    theta, other = PerturbedParameters(Blocks.of(model)), PerturbedParameters(Blocks.of(plain))
    u = Direction(Key(1), (1.0,) * len(theta.blocks))
    other.add(u, [0.1] * len(theta.blocks))
    with theta.fused_steps():
        with theta.step():
            theta.add(u, [0.1] * len(theta.blocks))
        with pytest.raises(RuntimeError), theta.step():
            raise RuntimeError
    assert same_bits(weights(model), weights(plain))


def test_weight_decay_is_the_same_in_a_managed_loop():
    ends = []
    for managed in (False, True):
        model = TiedLM()
        optimizer = ZOOptimizer(model, MeZO(), lr=0.01, weight_decay=0.1)
        with optimizer.theta.fused_steps() if managed else torch.no_grad():
            for _ in range(4):
                optimizer.step(model)
        ends.append(weights(model))
    assert same_bits(*ends)


# What the docstring of fused_steps asked for, enforced (A13 of the issue: rules that only a docstring held).


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.attention, torch.nn.DataParallel])
def test_a_state_dict_of_the_model_inside_fused_steps_holds_theta(of: Any):
    model, plain = TiedLM(), TiedLM()
    optimizer, other = ZOOptimizer(model, MeZO(), lr=0.01), ZOOptimizer(plain, MeZO(), lr=0.01)
    with optimizer.theta.fused_steps():
        for _ in range(3):
            optimizer.step(model), other.step(plain)
            assert not optimizer.theta.displacement.restored
            saved = {name: value.clone() for name, value in of(model).state_dict().items()}
            assert same_bits(saved, {name: value.clone() for name, value in of(plain).state_dict().items()})
        optimizer.step(model), other.step(plain)
    assert same_bits(weights(model), weights(plain))
    assert not model._state_dict_pre_hooks and not model.attention._state_dict_pre_hooks


def test_a_model_saved_with_safetensors_inside_fused_steps_is_theta(tmp_path: Any):
    from safetensors.torch import load_file, save_model

    model, plain = TiedLM(), TiedLM()
    optimizer = ZOOptimizer(model, MeZO(), lr=0.01)
    ZOOptimizer(plain, MeZO(), lr=0.01).step(plain)
    with optimizer.theta.fused_steps():
        optimizer.step(model)
        save_model(model, str(tmp_path / "model.safetensors"))
    held, wanted = load_file(tmp_path / "model.safetensors"), plain.state_dict()
    assert len(held) == 7 and all(torch.equal(value, wanted[name]) for name, value in held.items())  # a tie is saved once


def test_a_state_dict_in_a_closure_inside_fused_steps_is_refused():
    model = TiedLM()
    optimizer, before = ZOOptimizer(model, MeZO(), lr=0.01), weights(model)
    with optimizer.theta.fused_steps():
        with pytest.raises(RuntimeError, match="inside a closure would hold perturbed weights: take it between steps"):
            optimizer.step(lambda: model.state_dict() and model())
        optimizer.step(model)
        model.state_dict()
    assert farthest(before, weights(model)) > 1e-6


@pytest.mark.parametrize("at", ["the next step", "the end", "restore"])
def test_weights_written_while_they_are_perturbed_are_noticed(at: str):
    model, other = TiedLM(), {name: torch.zeros_like(value) for name, value in TiedLM().state_dict().items()}
    optimizer = ZOOptimizer(model, MeZO(), lr=0.01)

    def loop() -> None:
        with optimizer.theta.fused_steps():
            optimizer.step(model)
            with torch.no_grad():
                model.norm.weight.copy_(torch.zeros(8))
            if at == "restore":
                optimizer.theta.restore()
            if at == "the next step":
                optimizer.step(model)

    with pytest.raises(RuntimeError, match=r"'norm.weight' was written while .* call optimizer.theta.restore\(\) before"):
        loop()
    assert optimizer.steps_done == 1 and optimizer.theta.displacement.restored
    with optimizer.theta.fused_steps():  # the way out
        optimizer.step(model)
        optimizer.theta.restore()
        model.load_state_dict(other)
        optimizer.step(lambda: model() * 0)
    assert farthest(weights(model), {name: torch.zeros_like(value) for name, value in weights(model).items()}) < 1e-6


def test_two_optimizers_in_fused_steps_on_one_model_are_refused_and_one_after_the_other_are_not():
    model = TiedLM()
    first, second = (ZOOptimizer(model, MeZO(), lr=0.01, seed=seed) for seed in (1, 2))
    message = "another optimizer is inside fused_steps\\(\\) on this model"
    with first.theta.fused_steps():
        first.step(model)
        with pytest.raises(RuntimeError, match=message), second.theta.fused_steps():
            pytest.fail("entered")
        with pytest.raises(RuntimeError, match=message):
            second.step(model)
        first.step(model)
        with first.theta.fused_steps():  # its own, again
            first.step(model)
    for optimizer in (second, first):
        with optimizer.theta.fused_steps():
            optimizer.step(model)
    assert (first.steps_done, second.steps_done) == (4, 1)


def test_optimizers_of_other_parts_of_the_model_are_refused_and_of_other_models_are_not():
    model, other = TiedLM(), TiedLM()
    model.norm.requires_grad_(False)
    first = ZOOptimizer(model, MeZO())
    model.requires_grad_(False).norm.requires_grad_(True)
    second, third = ZOOptimizer(model, MeZO()), ZOOptimizer(other, MeZO())
    model.requires_grad_(True)
    with first.theta.fused_steps(), third.theta.fused_steps():
        first.step(model), third.step(other)
        with pytest.raises(RuntimeError, match="let one optimizer train all blocks"):
            second.step(model)
    second.step(model)
