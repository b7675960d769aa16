"""From losses to lr and epsilon: exact on parabolas, and epsilon follows rounding and truncation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from torch import Tensor

from l2l.methods.mezo import MeZO
from l2l.noise import Key, standard_noise
from l2l.optim import CurvatureLRState, curvature, learning_rate
from l2l.params import Blocks, PerturbedParameters
from l2l.tools.lr_probe import (
    EPSILONS,
    STEP_FRACTIONS,
    Exactness,
    LineLosses,
    ProbeConfig,
    ProbeResult,
    SlopeNoise,
    advise,
    choose_epsilon,
    choose_step_fraction,
    exactness,
    expected_change,
    pairs,
    probe,
    reasons,
    slope_noise,
    truncation,
)

FINE = 2.0**-48
"""Resolution of losses in float64."""


def probed(model: Any, loss: Callable[[], Tensor | float] | None = None, **options: Any) -> ProbeResult:
    closure = loss or model
    config = ProbeConfig(**{"probes": 8, "sweep": 4, **options})
    return probe(PerturbedParameters(Blocks.of(model)), MeZO(), lambda step, number: closure, config, FINE)


def truth(model: Quadratic, step: int) -> tuple[float, float]:
    """Slope and curvature along MeZO's direction of a step."""
    key = Key(0, step)
    z = {n: standard_noise(n, key, p.shape, "gaussian", torch.float64) for n, p in model.named_parameters()}
    gradients = torch.autograd.grad(model(), list(model.parameters()))
    slope = sum(float((z[n] * g).sum()) for (n, _), g in zip(model.named_parameters(), gradients, strict=True))
    return slope, float((model.curvature * z["matrix"] ** 2).sum() + (z["vector"] ** 2).sum())


def test_on_a_quadratic_slopes_and_curvatures_are_exact_and_lr_is_step_fraction_over_their_mean():
    model = Quadratic().double()
    wanted = np.array([truth(model, step) for step in range(8)])
    found = probed(model, step_fraction=0.15)
    np.testing.assert_allclose(found.chosen.slopes[:, 0], wanted[:, 0], rtol=1e-7)
    np.testing.assert_allclose(found.chosen.curvatures[:, 0], wanted[:, 1], rtol=1e-5)
    assert found.advice.curvature == pytest.approx(wanted[:, 1].mean(), rel=1e-5)
    assert found.advice.lr == pytest.approx(0.15 / wanted[:, 1].mean(), rel=1e-5)
    assert found.advice.ridges == 0


def test_the_rate_advised_is_the_one_that_lr_auto_would_make_of_the_same_losses():
    found = probed(TiedLM().double())
    seen, epsilon = found.chosen, found.advice.epsilon
    sides = zip(seen.plus[:, 0].tolist(), seen.minus[:, 0].tolist(), seen.center.tolist(), strict=True)
    measured = [curvature(plus, minus, center, epsilon, FINE) for plus, minus, center in sides]
    assert found.advice.lr == pytest.approx(
        learning_rate(found.advice.step_fraction, CurvatureLRState(sum(measured) / len(measured), 1.0))
    )


@pytest.mark.parametrize("perturb", ["in_place", "functional"])
def test_theta_is_restored_bit_for_bit_after_probes_and_after_an_error(perturb: Any):
    model, calls, config = TiedLM(), 0, ProbeConfig(probes=6, sweep=3)
    before = weights(model)
    theta = PerturbedParameters(Blocks.of(model), perturb)
    probe(theta, MeZO(), lambda step, number: model, config)
    assert same_bits(before, weights(model))

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise RuntimeError("out of something")
        return model()

    with pytest.raises(RuntimeError, match="out of something"):
        probe(theta, MeZO(), lambda step, number: failing, config)
    assert calls == 40
    assert same_bits(before, weights(model))


def test_epsilon_grows_as_losses_are_rounded_to_a_coarser_grid():
    model = Quadratic().double()
    chosen = [probed(model).advice.epsilon]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        chosen.append(probed(model, lambda dtype=dtype: model().to(dtype).double()).advice.epsilon)
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[2] < chosen[3]


def test_the_rounding_of_a_loss_is_found_where_there_is_some():
    model, draw = Quadratic().double(), np.random.default_rng(0)
    found = probed(model, lambda: float(model()) + 1e-6 * draw.standard_normal(), sweep=8)
    assert 3e-7 < found.advice.figures.loss_rounding < 3e-6


def test_epsilon_stays_where_truncation_leaves_slope_and_curvature_alone():
    epsilons, slopes, bends = np.array(EPSILONS), np.array([1.0, -2.0, 3.0]), np.array([5.0, 4.0, -6.0])

    def loss(distance: np.ndarray, third: float) -> np.ndarray:
        g, c = slopes[:, None], bends[:, None]
        return 1 + g * distance + c * distance**2 / 2 + third * g * distance**3 / 6 + third * c * distance**4 / 24

    for third, least, most in ((0.0, 1e-3, 1e-1), (1e4, 1e-4, 3e-3)):
        found = exactness(LineLosses(epsilons, loss(epsilons, third), loss(-epsilons, third), np.ones(3)))
        assert least <= found[choose_epsilon(found)].epsilon <= most
        assert found[3].slope_truncation == pytest.approx(third * 9e-6 / 6, rel=0.01, abs=1e-6)


def test_truncation_below_rounding_is_told_by_larger_epsilons():
    epsilons = np.array([1e-3, 1e-2, 1e-1, 1.0])
    draw = np.random.default_rng(0)
    noise = 1e-6 / epsilons**2
    values = 1 + 0.5 * epsilons**2 + np.sqrt(noise) * draw.standard_normal((200, 4))
    found = truncation(values, noise, epsilons)
    np.testing.assert_allclose(found, 0.5 * epsilons**2, rtol=0.05)


def test_signal_and_noise_of_slopes_are_told_apart():
    draw = np.random.default_rng(0)
    signal = 3 * draw.standard_normal(20_000)
    first, second = signal + draw.standard_normal((2, 20_000))
    found = slope_noise(first, second)
    assert found.signal == pytest.approx(9, rel=0.05)
    assert found.noise == pytest.approx(1, rel=0.1)
    assert found.share == pytest.approx(0.9, abs=0.01)
    assert slope_noise(first, -first).share == 0


def test_the_step_fraction_is_half_of_the_share_that_is_signal_within_what_is_known_to_serve():
    assert choose_step_fraction(SlopeNoise(1.0, 0.0, 0.1)) == STEP_FRACTIONS[1]
    assert choose_step_fraction(SlopeNoise(0.3, 0.7, 0.1)) == pytest.approx(0.15)
    assert choose_step_fraction(SlopeNoise(-0.2, 1.0, 0.1)) == STEP_FRACTIONS[0]


def test_a_step_is_expected_to_gain_most_at_the_best_lr_and_nothing_at_twice_that():
    figures = Exactness(1e-3, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    losses = LineLosses(np.array([1.0]), np.array([[3.0], [5.0]]), np.array([[3.0], [5.0]]), np.array([1.0, 3.0]))
    advice = advise(losses, SlopeNoise(0.6, 0.4, 0.1), figures)
    assert (advice.curvature, advice.lr) == (4.0, 0.05)
    assert (advice.lr_best, advice.lr_highest) == pytest.approx((0.15, 0.3))
    assert [expected_change(advice, lr) for lr in (0.0, 0.15, 0.3)] == pytest.approx([0, -1, 0])
    noisy = advise(losses, SlopeNoise(0.02, 0.98, 0.001), figures)
    assert any("larger batches" in line for line in reasons(noisy, EPSILONS, 2))
    assert len(reasons(advice, EPSILONS, 2)) == 2


def test_epsilons_at_which_the_loss_is_not_finite_are_left_out_and_named():
    model = Quadratic().double()
    start = weights(model)["vector"]

    def loss() -> Tensor | float:
        far = (model.vector - start).abs().max() > 0.02
        return float("inf") if far else model()

    found = probed(model, loss)
    assert found.dropped == (1e-2, 3e-2, 1e-1)
    assert found.advice.epsilon <= 3e-3
    with pytest.raises(FloatingPointError, match="try smaller epsilons"):
        probed(model, loss, epsilons=[1e-2, 3e-2, 1e-1])


def test_the_passes_and_the_progress_are_as_planned():
    seen: list[float] = []
    model, config = Quadratic().double(), ProbeConfig(probes=8, sweep=4)
    theta = PerturbedParameters(Blocks.of(model))
    found = probe(theta, MeZO(), lambda step, number: model, config, FINE, seen.append)
    assert len(seen) == pairs(config)
    assert found.passes == 4 * (1 + 2 * 7) + 4 * 3 + 8 * 2


@pytest.mark.parametrize("loss", [lambda model: 2.0 + 0 * model(), lambda model: model.vector.sum().round()])
def test_a_loss_that_does_not_bend_is_refused(loss: Callable[[Any], Tensor]):
    model = Quadratic().double()
    with pytest.raises(ValueError, match="no slope or no curvature"):
        probed(model, lambda: loss(model), epsilons=[1e-6, 2e-6, 4e-6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 1}, "probes=1 must be at least 2"),
        ({"sweep": 9}, "sweep=9 must be at most probes=8"),
        ({"epsilons": [1e-3, 1e-2]}, "at least 3 different numbers"),
        ({"epsilons": [1e-3, 1e-2, 1e-2]}, "at least 3 different numbers"),
        ({"epsilons": [1e-3, 1e-2, -1.0]}, "epsilons=-1.0 must be positive"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**{"probes": 8, "sweep": 4, **options})
