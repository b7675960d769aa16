"""ZO-AdaMU: against dense steps from the paper's equations, and against what its released code gets wrong."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from cases import Quadratic, TiedLM, weights
from dense_steps import EPSILON, LR, Loss, Weights, assert_same_run, normal, run, two_sided
from torch import Tensor, nn

from l2l.methods.adamu import AdaMU
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import dense_direction

HORIZON = 20


@pytest.fixture(params=[Quadratic, TiedLM])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double()


def annealed(t: int, bend: float, total: int = HORIZON) -> float:
    first, last = 0.0512 * total, 0.8 * total
    if t < first:
        return 1.0
    done = min(t, last) - first
    length = total - bend * (total - last) / (last - first) * done
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done / length))


class Paper:
    """Equations 6 to 8."""

    def __init__(self, at: Weights) -> None:
        self.m = {name: torch.zeros_like(value) for name, value in at.items()}

    def step(self, loss: Loss, at: Weights, key: Key) -> Weights:
        alpha, beta1, beta2 = (annealed(key.step, bend) for bend in (1.0, 0.1, 1.5))
        zc = {n: math.sqrt(alpha) * normal(n, key, *value.shape) for n, value in at.items()}
        zh = {n: self.m[n] + math.sqrt(1 - alpha) * normal(f"{n}#history", key, *v.shape) for n, v in at.items()}
        self.m = {n: beta1 * zc[n] + (1 - beta1) * zh[n] for n in at}
        v = {n: beta2 * zc[n] ** 2 + (1 - beta2) * zh[n] ** 2 for n in at}
        g = two_sided(loss, at, self.m)
        return {n: value - LR * g * self.m[n] / (v[n] + 1e-8).sqrt() for n, value in at.items()}


def test_it_takes_the_steps_of_the_paper(model: nn.Module):
    assert_same_run(model, AdaMU(EPSILON, horizon=HORIZON), Paper(weights(model)).step)


def test_while_it_explores_it_is_the_estimate_divided_by_its_own_noise(model: nn.Module):
    def dense(loss: Loss, at: Weights, key: Key) -> Weights:
        z = {name: normal(name, key, *value.shape) for name, value in at.items()}
        g = two_sided(loss, at, z)
        return {name: value - LR * g * z[name] / (z[name] ** 2 + 1e-8).sqrt() for name, value in at.items()}

    assert_same_run(model, AdaMU(EPSILON, explore=0.5, horizon=40), dense)


def test_what_is_updated_and_remembered_is_what_was_looked_along(model: nn.Module):
    looks: list[Weights] = []

    def watched() -> Tensor:
        looks.append(weights(model))
        return model()

    optimizer = ZOOptimizer(model, AdaMU(EPSILON, horizon=HORIZON), LR)
    for _ in range(8):
        optimizer.step(watched)
    plus, minus = looks[-2:]
    assert optimizer.report is not None
    (seen,) = optimizer.report.estimates
    for block, history in zip(optimizer.blocks, optimizer.method_state.history, strict=True):
        torch.testing.assert_close(history, (plus[block.name] - minus[block.name]) / (2 * EPSILON), rtol=1e-6, atol=1e-9)
    assert seen.direction.key == Key(0, 7)


def test_the_schedule_does_not_depend_on_how_many_tensors_there_are_or_how_often_it_is_asked():
    method = AdaMU(horizon=HORIZON)
    asked = [method.weight("beta2", 9) for _ in range(50)]
    assert asked == [annealed(9, 1.5)] * 50
    first = run(Quadratic().double(), AdaMU(EPSILON, horizon=HORIZON), 9).report
    second = run(TiedLM().double(), AdaMU(EPSILON, horizon=HORIZON), 9).report
    shapes = [report.estimates[0].direction.shape for report in (first, second) if report is not None]
    assert len({(vars(shape)["_alpha"], vars(shape)["_beta1"]) for shape in shapes}) == 1


@pytest.mark.parametrize("name", ["alpha", "beta1", "beta2"])
def test_every_weight_falls_from_1_and_rests_after_the_settling(name: str):
    method = AdaMU(horizon=1000)
    values = [method.weight(name, step) for step in range(1100)]
    assert values[:51] == [1.0] * 51
    assert all(0 <= after <= before for before, after in pairwise(values))
    assert len(set(values[800:])) == 1


def test_without_a_horizon_the_first_1024_steps_look_along_plain_noise():
    method = AdaMU()
    assert [method.weight("alpha", step) for step in (1023, 1024)] == [1.0, 1.0]
    assert method.weight("alpha", 1030) < 1.0


def test_the_direction_is_the_same_however_often_it_is_written(model: nn.Module):
    optimizer = run(model, AdaMU(EPSILON, horizon=HORIZON), 5)
    direction = AdaMU(EPSILON, horizon=HORIZON).direction(optimizer.blocks, optimizer.method_state, Key(1, 5))
    assert torch.equal(dense_direction(direction, optimizer.blocks, 0), dense_direction(direction, optimizer.blocks, 0))


@pytest.mark.parametrize(("explore", "settle"), [(0.9, 0.8), (-0.1, 0.8), (0.1, 1.2)])
def test_phases_out_of_order_are_refused(explore: float, settle: float):
    with pytest.raises(ValueError, match=f"explore={explore} must lie below settle={settle}"):
        AdaMU(explore=explore, settle=settle)


def test_a_horizon_that_is_no_count_is_refused():
    with pytest.raises(ValueError, match="horizon=0 must be a whole number"):
        AdaMU(horizon=0)
