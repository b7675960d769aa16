"""Whatever happens during a step, theta is back where the step began."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TiedLM, farthest, same_bits, weights

import l2l.params.engine
from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters

EPSILON = 1e-3
TOLERANCE = 5e-7
"""A few roundings of weights of size one."""


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Python's own handler: a process that was started in the background (``make test &``) ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(draw: int = 0) -> tuple[TiedLM, PerturbedParameters, Direction]:
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model))
    return model, theta, Direction(Key(3, draw=draw), (1.0,) * len(theta.blocks))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_an_error_after_any_move_puts_theta_back(error: type[BaseException], moves: int):
    model, theta, u = start()
    v = Direction(Key(4), u.sigma)
    before = weights(model)
    amounts = [0.1] * len(theta.blocks)
    walk = [
        lambda: theta.perturb(u, EPSILON),
        lambda: theta.perturb(u, -EPSILON),
        lambda: theta.add(u, amounts),
        lambda: theta.add(v, amounts),
    ]
    with pytest.raises(error), theta.step():
        for move in walk[:moves]:
            move()
        raise error
    assert farthest(before, weights(model)) < TOLERANCE
    theta.restore()
    assert farthest(before, weights(model)) < TOLERANCE


def test_an_error_after_an_interpolation_undoes_it_and_what_came_before():
    model, theta, u = start()
    anchor = {i: torch.zeros_like(block.tensor) for i, block in enumerate(theta.blocks)}
    before = weights(model)
    with pytest.raises(RuntimeError), theta.step():
        theta.add(u, [0.1] * len(theta.blocks))
        theta.restore()
        here = {i: block.tensor.detach().clone() for i, block in enumerate(theta.blocks)}
        theta.interpolate(anchor, here, dict.fromkeys(anchor, 0.5))
        raise RuntimeError
    assert farthest(before, weights(model)) < TOLERANCE


def test_a_step_that_ends_away_from_home_comes_home():
    model, theta, u = start()
    before = weights(model)
    with theta.step():
        theta.perturb(u, EPSILON)
    assert farthest(before, weights(model)) < TOLERANCE


def test_an_error_does_not_undo_the_step_before():
    model, theta, u = start()
    with theta.step():
        theta.add(u, [0.1] * len(theta.blocks))
    before = weights(model)
    with pytest.raises(RuntimeError), theta.step():
        raise RuntimeError
    assert same_bits(before, weights(model))


class Interrupting:
    """Stands in for ``traverse`` and raises real interrupt signals in the middle of chosen traversals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
        self.at, self.calls, self.genuine = at, 0, l2l.params.engine.add_noise
        monkeypatch.setattr(l2l.params.engine, "add_noise", self)

    def __call__(self, pieces: Any, terms: Any, *rest: Any) -> None:
        half = len(pieces) // 2
        for part in (slice(half), slice(half, None)):
            self.genuine(pieces[part], [replace(term, scales=term.scales[part]) for term in terms], *rest)
            if part.stop is not None and self.calls in self.at:
                signal.raise_signal(signal.SIGINT)
        self.calls += 1


@pytest.mark.parametrize("traversal", [0, 1])
def test_an_interrupt_during_a_traversal_is_delivered_after_it_and_theta_is_put_back(
    traversal: int, monkeypatch: pytest.MonkeyPatch
):
    model, theta, u = start()
    before, blocks = weights(model), len(theta.blocks)
    interrupting = Interrupting(monkeypatch, {traversal})
    reached = 0
    with pytest.raises(KeyboardInterrupt), theta.step():
        theta.perturb(u, EPSILON)
        reached = 1
        theta.perturb(u, -EPSILON)
        reached = 2
        theta.add(u, [0.1] * blocks)
        reached = 3
    assert reached == traversal
    assert interrupting.calls == traversal + 2
    assert farthest(before, weights(model)) < TOLERANCE
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_a_step_is_made_final_waits_until_it_is_counted(monkeypatch: pytest.MonkeyPatch):
    model, theta, u = start()
    whole, other, _ = start()
    for one in (theta, other):
        if one is theta:
            Interrupting(monkeypatch, {2})
        with one.step():
            one.perturb(u, EPSILON)
            one.perturb(u, -EPSILON)
            one.add(u, [0.1] * len(theta.blocks))
    assert same_bits(weights(model), weights(whole))
    with pytest.raises(KeyboardInterrupt):
        theta.raise_deferred_interrupt()
    theta.raise_deferred_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_during_the_way_back_waits_as_well(monkeypatch: pytest.MonkeyPatch):
    model, theta, u = start()
    v = Direction(Key(4), u.sigma)
    before, blocks = weights(model), len(theta.blocks)
    Interrupting(monkeypatch, {0, 1})
    with pytest.raises(KeyboardInterrupt), theta.step():
        theta.add(u, [0.1] * blocks)
        theta.add(v, [0.1] * blocks)
        theta.perturb(u, EPSILON)
    assert farthest(before, weights(model)) < TOLERANCE


def test_an_interrupt_during_a_search_is_delivered_after_the_copy(monkeypatch: pytest.MonkeyPatch):
    model, theta, _ = start()
    anchor = {i: torch.zeros_like(block.tensor) for i, block in enumerate(theta.blocks)}
    here = {i: block.tensor.detach().clone() for i, block in enumerate(theta.blocks)}
    before, genuine = weights(model), torch.lerp

    def interrupting(*arguments: Any, **named: Any) -> torch.Tensor:
        if arguments[0] is anchor[1]:
            signal.raise_signal(signal.SIGINT)
        return genuine(*arguments, **named)

    monkeypatch.setattr(torch, "lerp", interrupting)
    with pytest.raises(KeyboardInterrupt), theta.step():
        theta.interpolate(anchor, here, dict.fromkeys(anchor, 0.5))
    assert same_bits(before, weights(model))


def test_a_handler_of_the_callers_own_is_called_and_stays(monkeypatch: pytest.MonkeyPatch):
    _, theta, u = start()
    heard: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        Interrupting(monkeypatch, {0})
        theta.perturb(u, EPSILON)
        assert heard == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, previous)


def test_walking_works_outside_the_main_thread():
    (model, theta, u), (other, straight, _) = start(), start()
    thread = threading.Thread(target=theta.perturb, args=(u, EPSILON))
    thread.start()
    thread.join()
    straight.perturb(u, EPSILON)
    assert same_bits(weights(model), weights(other))


@pytest.mark.parametrize("move", ["look", "add", "home"])
def test_interrupts_are_held_back_in_every_traversal(move: str, monkeypatch: pytest.MonkeyPatch):
    _, theta, u = start()
    theta.perturb(u, EPSILON)
    interrupting = Interrupting(monkeypatch, {0})
    with pytest.raises(KeyboardInterrupt):
        {"look": lambda: theta.perturb(u, -EPSILON), "home": theta.restore, "add": lambda: theta.add(u, [1.0] * 6)}[move]()
    assert interrupting.calls == 1
    assert theta.displacement.restored == (move != "look")


def test_weight_decay_shrinks_blocks_by_their_factors():
    model, theta, _ = start()
    before = weights(model)
    theta.shrink([0.5] + [1.0] * (len(theta.blocks) - 1))
    after = weights(model)
    first, *others = theta.blocks.names
    assert torch.equal(after[first], 0.5 * before[first])
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_an_interrupt_during_weight_decay_waits_until_the_step_is_counted(monkeypatch: pytest.MonkeyPatch):
    (model, theta, u), (whole, other, _) = start(), start()
    with other.step():
        other.add(u, [0.1] * len(theta.blocks))
        other.shrink([0.9] * len(theta.blocks))
    genuine = torch.Tensor.mul_

    def interrupting(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return genuine(tensor, factor)

    monkeypatch.setattr(torch.Tensor, "mul_", interrupting)
    with theta.step():
        theta.add(u, [0.1] * len(theta.blocks))
        theta.shrink([0.9] * len(theta.blocks))
    assert same_bits(weights(whole), weights(model))
    with pytest.raises(KeyboardInterrupt):
        theta.raise_deferred_interrupt()


def test_an_error_after_weight_decay_undoes_it():
    model, theta, u = start()
    before = weights(model)
    with pytest.raises(RuntimeError), theta.step():
        theta.add(u, [0.1] * len(theta.blocks))
        theta.shrink([0.9] * len(theta.blocks))
        raise RuntimeError
    assert farthest(before, weights(model)) < TOLERANCE
