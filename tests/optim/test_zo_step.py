"""The loop body: what it reports, in which order it asks, and what it costs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, farthest, weights
from torch import Tensor

import l2l.params.engine
from l2l.methods.dizo import DiZO
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.noise import Key, backend_problem, native
from l2l.optim import StepReport, ZOOptimizer, zo_step
from l2l.params import Blocks, PerturbedParameters
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics

KEY = Key(2, 9)


def step(model: Quadratic | TiedLM, method: MeZO | DiZO | Learned, lr: float = 0.01) -> tuple[object, StepReport]:
    theta = PerturbedParameters(Blocks.of(model))
    return zo_step(model, theta, method, method.init(theta.blocks), KEY, [lr] * len(theta.blocks))


@pytest.mark.parametrize("num_directions", [1, 2, 5])
def test_it_reports_what_it_saw(num_directions: int):
    _, report = step(Quadratic(), MeZO(num_directions=num_directions))
    assert report.key == KEY
    assert report.passes == 2 * num_directions
    assert [seen.direction.key for seen in report.estimates] == [KEY.with_draw(draw) for draw in range(num_directions)]
    losses = [loss for seen in report.estimates for loss in (seen.loss_plus, seen.loss_minus)]
    assert report.loss == pytest.approx(sum(losses) / len(losses))
    mean = sum(seen.projected_gradient for seen in report.estimates) / num_directions
    assert report.projected_gradient == pytest.approx(mean)


def test_each_block_has_its_own_learning_rate():
    model = Quadratic().double()
    before = weights(model)
    theta = PerturbedParameters(Blocks.of(model))
    zo_step(model, theta, MeZO(), None, KEY, [0.0, 0.01])
    after = weights(model)
    torch.testing.assert_close(after["matrix"], before["matrix"], rtol=0, atol=1e-14)
    assert (after["vector"] - before["vector"]).abs().min() > 1e-6


def test_weight_decay_comes_after_the_update():
    decayed, plain = Quadratic().double(), Quadratic().double()
    zo_step(decayed, PerturbedParameters(Blocks.of(decayed)), MeZO(), None, KEY, [0.1, 0.1], [0.5, 0.0])
    zo_step(plain, PerturbedParameters(Blocks.of(plain)), MeZO(), None, KEY, [0.1, 0.1], [0.0, 0.0])
    left, right = weights(decayed), weights(plain)
    torch.testing.assert_close(left["matrix"], 0.95 * right["matrix"], rtol=1e-12, atol=0)
    assert torch.equal(left["vector"], right["vector"])


def test_a_tuner_sees_theta_at_home_and_its_history_is_what_was_seen():
    model = TiedLM()
    method = Learned(Tuner.for_model(model), num_directions=2)
    state, report = step(model, method)
    assert isinstance(state, RunStatistics)
    last = report.estimates[-1]
    assert (state.loss_plus, state.loss_minus) == (last.loss_plus, last.loss_minus)
    assert torch.equal(state.sigma, torch.tensor(last.direction.sigma))
    fresh = TiedLM()
    blocks = Blocks.of(fresh)
    wanted = [method.direction(blocks, method.init(blocks), KEY.with_draw(draw)) for draw in range(2)]
    assert [seen.direction for seen in report.estimates] == wanted


def test_three_traversals_make_a_step_of_mezo(monkeypatch: pytest.MonkeyPatch):
    model, visits = TiedLM(), 0
    genuine = l2l.params.engine.add_noise

    def counting(pieces, *arguments) -> None:
        nonlocal visits
        visits += len(pieces)
        genuine(pieces, *arguments)

    monkeypatch.setattr(l2l.params.engine, "add_noise", counting)
    step(model, MeZO())
    assert visits == 3 * len(Blocks.of(model))


def test_an_error_in_a_further_batch_undoes_the_step():
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model))
    method = DiZO(interval=1)
    before = weights(model)

    def fresh(index: int) -> TiedLM:
        raise OSError("the data are gone")

    with pytest.raises(OSError, match="the data are gone"):
        zo_step(model, theta, method, method.init(theta.blocks), KEY, [0.1] * len(theta.blocks), fresh=fresh)
    assert farthest(before, weights(model)) < 1e-6


def test_the_closure_sees_theta_moved_by_epsilon_either_way():
    model = Quadratic().double()
    before, seen = weights(model), []

    def closure() -> Tensor:
        seen.append(weights(model)["matrix"] - before["matrix"])
        return model()

    theta = PerturbedParameters(Blocks.of(model))
    zo_step(closure, theta, MeZO(epsilon=1e-2), None, KEY, [0.1, 0.1])
    torch.testing.assert_close(seen[0], -seen[1], rtol=1e-9, atol=1e-14)
    assert seen[0].std().item() == pytest.approx(1e-2, rel=0.5)


FRAMES = 13
"""Of the step, what counts and records its evaluations, what completes writes that fail, and the engine."""


@pytest.mark.skipif(backend_problem("native") is not None, reason="no C compiler here")
def test_few_frames_lie_between_the_optimizers_step_and_the_kernel(monkeypatch: pytest.MonkeyPatch):
    depths, genuine = [], native.library()
    assert genuine is not None

    class Watched:
        """The compiled library; notes how many Python frames a call of it lies below the caller of the optimizer."""

        @staticmethod
        def add_noise(*arguments: Any) -> None:
            frame, depth = sys._getframe(1), 1
            while frame is not None and frame.f_code.co_qualname != "ZOOptimizer.step":
                frame, depth = frame.f_back, depth + 1
            if frame is not None:  # else it is the end of the fused steps
                depths.append(depth)
            genuine.add_noise(*arguments)

    monkeypatch.setattr(native, "library", lambda: Watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # several threads take the compiled function itself
    monkeypatch.setenv("L2L_NOISE", "native")
    model = TiedLM()
    optimizer = ZOOptimizer(model, MeZO())
    with optimizer.theta.fused_steps():
        for _ in range(2):
            optimizer.step(model)
    assert len(depths) == 4 and max(depths) <= FRAMES


def test_a_learning_rate_of_zero_moves_nothing_and_a_negative_one_is_refused():
    model = Quadratic()
    before = weights(model)
    optimizer = ZOOptimizer(model, MeZO())
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(3):
        optimizer.step(model)
    assert farthest(before, weights(model)) < 1e-6
    for lr in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lr=.* must be finite and not negative"):
            ZOOptimizer(model, MeZO(), lr=lr)
