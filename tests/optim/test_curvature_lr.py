"""``lr="auto"``: the curvature that is measured, the learning rate that follows, and what does not change."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import ALONG_NOISE, STEPPED, MethodCase, Quadratic, TiedLM, farthest, named, same_bits, weights
from torch import Tensor, nn

import l2l
from l2l.estimators import Estimate, center_loss, two_point
from l2l.methods.base import Method, StepContext, descend
from l2l.methods.mezo import MeZO
from l2l.noise import Key, standard_noise
from l2l.optim import (
    CurvatureLR,
    CurvatureLRState,
    StepReport,
    ZOOptimizer,
    curvature,
    learning_rate,
    update_average,
    zo_step,
)
from l2l.params import Blocks, Direction, PerturbedParameters

pytestmark = pytest.mark.in_turn

KEY = Key(2, 0)
NEVER = 10**9
FINE = 2.0**-48
"""Resolution of losses in float64."""


@dataclass(frozen=True)
class Scaled(Method[None]):
    """MeZO with one sigma for all blocks."""

    sigma: float = 1.0
    epsilon: float = 1e-2

    @property
    def passes(self) -> float:
        return 2.0

    def state_bytes(self, blocks: Blocks) -> int:
        return 0

    def init(self, blocks: Blocks) -> None:
        return None

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return Direction(key, (self.sigma,) * len(blocks))

    def update_(self, theta: PerturbedParameters, state: None, estimates: Sequence[Estimate], context: StepContext) -> None:
        descend(theta, estimates, context.lr)


def true_curvature(model: Quadratic, key: Key) -> float:
    """u^T H u of MeZO's direction under ``key``."""
    z = {n: standard_noise(n, key, p.shape, "gaussian", torch.float64) for n, p in model.named_parameters()}
    return float((model.curvature * z["matrix"] ** 2).sum() + (z["vector"] ** 2).sum())


def step_with_curvature(model: nn.Module, control: CurvatureLR, state: CurvatureLRState, method: Method[Any]) -> StepReport:
    theta = PerturbedParameters(Blocks.of(model))
    fractions = [control.step_fraction] * len(theta.blocks)
    return zo_step(
        model, theta, method, method.init(theta.blocks), KEY, fractions, curvature_lr=control, curvature_lr_state=state
    )[1]


@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("epsilon", [1e-3, 0.3])
def test_on_a_quadratic_the_curvature_is_that_of_the_hessian_along_the_first_direction(num_directions: int, epsilon: float):
    model = Quadratic().double()
    wanted = true_curvature(model, KEY)
    control = CurvatureLR(step_fraction=0.25, resolution=FINE, needed=1)
    report = step_with_curvature(model, control, CurvatureLRState(), MeZO(epsilon=epsilon, num_directions=num_directions))
    assert report.curvature == pytest.approx(wanted, rel=1e-7)
    assert report.lr == pytest.approx((0.25 / wanted,) * 2, rel=1e-7)
    assert report.passes == 2 * num_directions + 1


def test_step_fraction_one_goes_to_the_minimum_along_the_direction():
    model = Quadratic().double()
    theta = PerturbedParameters(Blocks.of(model))
    zo_step(model, theta, MeZO(), None, KEY, [1.0, 1.0], curvature_lr=CurvatureLR(resolution=FINE, needed=1))
    u = MeZO().direction(theta.blocks, None, KEY)
    assert abs(two_point(model, theta, u, 1e-3).projected_gradient) < 1e-6 * true_curvature(model, KEY)
    theta.restore()


def test_the_average_weighs_the_last_most_and_is_not_drawn_to_zero():
    state = update_average(update_average(CurvatureLRState(), 3.0, 0.9), 5.0, 0.9)
    assert update_average(CurvatureLRState(), 3.0, 0.9).average == pytest.approx(3.0)
    assert state.average == pytest.approx((0.9 * 3 + 5) / 1.9)
    assert learning_rate(0.1, state) == pytest.approx(0.1 / state.average)
    for _ in range(300):
        state = update_average(state, 7.0, 0.9)
    assert state.average == pytest.approx(7.0)


def test_the_rate_grows_by_no_more_than_the_decay_lets_it():
    state = CurvatureLRState()
    for _ in range(100):
        state = update_average(state, 7.0, 0.9)
    assert learning_rate(0.1, update_average(state, 0.0, 0.9)) / learning_rate(0.1, state) == pytest.approx(1 / 0.9, rel=1e-4)


def test_a_curvature_below_the_rounding_of_losses_counts_as_what_rounding_could_feign():
    floor = 2.0**-21 * 2.0 / 1e-6
    assert curvature(2.0, 2.0, 2.0, 1e-3) == pytest.approx(floor)
    assert curvature(2.0, 2.0, 2.0 + 2**-23, 1e-3) == pytest.approx(floor)
    assert curvature(2.0, 2.0, 1.0, 1e-3) == pytest.approx(2e6)
    assert curvature(1.0, 1.0, 2.0, 1e-3) == pytest.approx(2e6), "a ridge is as curved as a valley"


def test_the_rate_on_flat_losses_is_bounded_and_a_loss_of_zero_does_not_move():
    flat, nothing = TiedLM(), TiedLM()
    before = weights(nothing)
    optimizer = l2l.MeZO(flat, lr="auto", curvature_lr=CurvatureLR(needed=1))
    optimizer.step(lambda: 3.0 + 0 * flat())
    assert optimizer.report is not None
    assert optimizer.report.lr[0] == pytest.approx(0.1 * 1e-6 / (3 * 2**-21))
    still = l2l.MeZO(nothing, lr="auto", weight_decay=0.5)
    still.step(lambda: 0 * nothing())
    assert still.report is not None
    assert (still.report.curvature, still.report.lr[0]) == (0.0, 0.0)
    assert farthest(before, weights(nothing)) < 1e-6


def test_an_epsilon_whose_square_vanishes_is_named():
    with pytest.raises(FloatingPointError, match="curvature overflows at epsilon=1e-200"):
        curvature(2.0, 2.0, 1.0, 1e-200)


@pytest.mark.parametrize("case", ALONG_NOISE, ids=named)
def test_with_the_average_frozen_a_step_is_that_of_a_constant_learning_rate(case: MethodCase):
    fixed, auto = TiedLM(), TiedLM()
    one = ZOOptimizer(fixed, case.make(fixed), lr=0.01 / 4, seed=3)
    two = ZOOptimizer(
        auto, case.make(auto), lr="auto", seed=3, step_fraction=0.01, curvature_lr=CurvatureLR(every=NEVER, warm_up=0)
    )
    one.steps_done = two.steps_done = 1  # step 0 always measures
    two.curvature_lr_state = CurvatureLRState(4.0, 1.0, 3)
    losses = [(one.step(fixed), two.step(auto)) for _ in range(7)]
    assert all(left == right for left, right in losses)
    assert same_bits(weights(fixed), weights(auto))
    assert two.report is not None
    assert two.report.curvature is None


def path(method: Method[Any], times: float, steps: int = 12) -> dict[str, Tensor]:
    model = Quadratic().double()
    control = CurvatureLR(every=3, warm_up=2, resolution=FINE)
    optimizer = ZOOptimizer(model, method, lr="auto", curvature_lr=control)
    for _ in range(steps):
        optimizer.step(lambda: times * model())
    return weights(model)


def test_the_unit_of_the_loss_and_the_length_of_the_direction_do_not_matter():
    plain = path(Scaled(sigma=1.0), 1.0)
    assert farthest(plain, weights(Quadratic().double())) > 0.1
    assert farthest(plain, path(Scaled(sigma=1.0), 10.0)) < 1e-8
    assert farthest(plain, path(Scaled(sigma=3.0), 1.0)) < 1e-8


@pytest.mark.parametrize("case", STEPPED, ids=named)
def test_a_run_of_any_method_saved_half_way_continues_bit_for_bit(case: MethodCase):
    model = TiedLM()
    optimizer = ZOOptimizer(model, case.make(model), lr="auto", curvature_lr=CurvatureLR(every=3, warm_up=2, step_fraction=0.2))
    for _ in range(5):
        optimizer.step(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    rest = [optimizer.step(model) for _ in range(6)]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = TiedLM()
    again = ZOOptimizer(resumed, case.make(resumed), lr=123.0, seed=99)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert [again.step(resumed) for _ in range(6)] == rest
    assert same_bits(weights(model), weights(resumed))
    assert again.curvature_lr == optimizer.curvature_lr
    assert again.curvature_lr_state == optimizer.curvature_lr_state


def test_a_state_from_before_curvature_lr_loads_as_a_constant_learning_rate():
    model, other = Quadratic(), Quadratic()
    old = l2l.MeZO(model, lr=0.01).state_dict()
    del old["zeroth_order"]["control"]
    optimizer = l2l.MeZO(other, lr="auto")
    optimizer.load_state_dict(old)
    optimizer.step(other)
    assert optimizer.report is not None
    assert (optimizer.curvature_lr, optimizer.report.lr, optimizer.report.passes) == (None, (0.01, 0.01), 2)


@pytest.mark.parametrize("perturb", ["in_place", "functional"])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FloatingPointError])
def test_whichever_of_three_losses_fails_theta_and_average_are_back(
    error: type[BaseException], failing_call: int, perturb: Any
):
    model, calls = TiedLM(), 0
    optimizer = l2l.MeZO(model, lr="auto", perturb=perturb)
    optimizer.step(model)
    before, state = weights(model), optimizer.curvature_lr_state

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
    assert optimizer.curvature_lr_state is state
    optimizer.step(model)


def test_third_losses_are_taken_when_due_and_counted_and_not_among_the_losses_returned():
    model = Quadratic()
    optimizer = l2l.MeZO(model, lr="auto", num_directions=2, curvature_lr=CurvatureLR(every=4, warm_up=2))
    passes, measured = [], []
    for _ in range(9):
        loss = optimizer.step(model)
        assert optimizer.report is not None
        seen = [value for e in optimizer.report.estimates for value in (e.loss_plus, e.loss_minus)]
        assert loss == pytest.approx(sum(seen) / 4)
        passes.append(optimizer.report.passes)
        measured.append(optimizer.report.curvature is not None)
    assert measured == [True, True, False, False, True, False, False, False, True]
    assert passes == [5 if due else 4 for due in measured]


def test_the_closure_sees_theta_itself_and_then_both_sides():
    model = Quadratic().double()
    before, seen = weights(model)["matrix"], []

    def closure() -> Tensor:
        seen.append(weights(model)["matrix"] - before)
        return model()

    l2l.MeZO(model, lr="auto").step(closure)
    assert not seen[0].any()
    torch.testing.assert_close(seen[1], -seen[2], rtol=1e-9, atol=1e-14)


def test_in_half_precision_the_third_loss_reads_what_both_sides_read():
    """Norms have float32 masters, which the weights that the model holds round."""
    model = TiedLM().bfloat16()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer = l2l.MeZO(model, lr=0.05)
    for _ in range(5):
        optimizer.step(model)
    theta = optimizer.theta
    nowhere = Direction(KEY, (0.0,) * len(theta.blocks))

    def closure() -> Tensor:
        return model.norm(x).float().pow(2).mean()

    with theta.step():
        middle = center_loss(closure, theta, nowhere)
        seen = two_point(closure, theta, nowhere, 1e-3)
    assert middle == seen.loss_plus == seen.loss_minus
    assert middle != closure().item()


def test_torch_schedulers_act_on_step_fraction_groups_override_it_and_decay_takes_the_rate_used():
    model = TiedLM().double()
    groups = [{"match": "attention", "lr": 0.3}]
    control = CurvatureLR(resolution=FINE, needed=1)
    optimizer = ZOOptimizer(model, MeZO(), "auto", groups=groups, weight_decay=0.5, step_fraction=0.2, curvature_lr=control)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.2]
    optimizer.step(model)
    scheduler.step()
    before = weights(model)
    optimizer.step(model)
    report = optimizer.report
    assert report is not None
    mean = report.curvature_lr_state.average
    rates = dict(zip(optimizer.blocks.names, report.lr, strict=True))
    assert rates["attention.out.weight"] == pytest.approx(0.15 / mean)
    assert rates["embed.weight"] == pytest.approx(0.1 / mean)
    z = standard_noise("embed.weight", Key(0, 1), before["embed.weight"].shape, "gaussian", torch.float64)
    used = rates["embed.weight"]
    wanted = (before["embed.weight"] - used * report.projected_gradient * z) * (1 - used * 0.5)
    torch.testing.assert_close(weights(model)["embed.weight"], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("every", "warm_up", "first"), [(5, 5, 2), (5, 0, 10), (1, 0, 2)])
def test_theta_stays_until_three_curvatures_are_known(every: int, warm_up: int, first: int):
    """The first alone may be next to 0: here by a loss that is flat, and steep along the gradient, in the first step."""
    model = Quadratic().double()
    start = weights(model)
    optimizer = l2l.MeZO(model, lr="auto", curvature_lr=CurvatureLR(every=every, warm_up=warm_up, resolution=2.0**-48))
    flat = sum(parameter.sum() for parameter in model.parameters())
    optimizer.step(lambda: 100 * sum(parameter.sum() for parameter in model.parameters()) - 100 * flat)
    assert optimizer.report is not None and optimizer.report.curvature is not None
    assert optimizer.report.curvature < 1e-3 and abs(optimizer.report.projected_gradient) > 1
    for _ in range(first - 1):
        assert optimizer.report.lr == (0.0, 0.0)
        optimizer.step(model)
    assert farthest(weights(model), start) < 1e-12
    optimizer.step(model)
    assert optimizer.report.lr[0] == pytest.approx(0.1 / optimizer.curvature_lr_state.average)
    assert 1e-6 < farthest(weights(model), start) < 1
