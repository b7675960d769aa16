"""Walking along a basis: home again, merged as well as apart, in every precision, and only the rows that are looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from based import EPSILON, based, basis_of, formula, written
from cases import TiedLM, farthest, same_bits, weights
from perturbed import language_loss
from torch import Tensor, nn

import l2l.params.engine
from l2l.models.shapes import tiny_random
from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters
from l2l.params.engine import block_moments

pytestmark = pytest.mark.in_turn

UPDATES: tuple[Any, ...] = ("master", "stochastic")


def one_step(theta: PerturbedParameters, closure: Any, number: int, basis: Any, lr: float | None) -> float:
    """A MeZO step along a basis, or one by a given amount; the loss at one side."""
    u = based(theta.blocks, key=Key(0, number), basis=basis)
    with torch.no_grad(), theta.step():
        theta.perturb(u, EPSILON)
        plus = float(theta.evaluate(closure))
        theta.perturb(u, -EPSILON)
        minus = float(theta.evaluate(closure))
        amount = -1e-3 if lr is None else -lr * (plus - minus) / (2 * EPSILON)
        theta.add(u, [amount] * len(theta.blocks))
    return plus


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_going_home_returns_within_one_rounding_for_each_kind_of_noise(dtype: torch.dtype):
    model = TiedLM().to(dtype)
    theta = PerturbedParameters(Blocks.of(model))
    before = weights(model)
    theta.perturb(based(theta.blocks), EPSILON)
    away = weights(model)
    theta.restore()
    for name, value in weights(model).items():
        # Out and back, dense and along the basis: four roundings of half a unit.
        unit = torch.finfo(dtype).eps * torch.maximum(before[name].abs(), away[name].abs())
        assert ((value - before[name]).abs() <= 2 * unit + torch.finfo(dtype).eps * EPSILON).all()


def drift(along_basis: bool, managed: bool) -> float:
    """Relative distance from where 300 steps at lr 0 began."""
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.copy_(0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    theta = PerturbedParameters(Blocks.of(model))
    before, basis = model.weight.detach().clone(), basis_of(theta.blocks, rank=8)
    with theta.fused_steps() if managed else torch.no_grad():
        for step in range(300):
            more = {"basis": basis, "basis_sigma": (1.0, 0.0)} if along_basis else {}
            u = Direction(Key(0, step), (1.0, 1.0), **more)
            with theta.step():
                theta.perturb(u, EPSILON)
                theta.perturb(u, -EPSILON)
                theta.add(u, [0.0, 0.0])
    now = model.weight.detach()
    return (torch.linalg.vector_norm(now - before) / torch.linalg.vector_norm(before)).item()


@pytest.mark.parametrize("managed", [False, True])
def test_three_hundred_steps_without_learning_drift_less_than_three_millionths(managed: bool):
    assert drift(True, managed) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walking_exactly_leaves_the_same_bits(dtype: torch.dtype):
    model = TiedLM().to(dtype)
    theta = PerturbedParameters(Blocks.of(model), "functional")
    before, basis = weights(model), basis_of(theta.blocks)
    for step in range(100):
        one_step(theta, model, step, basis, lr=0.0)
    assert same_bits(before, weights(model))


def both_ways(dtype: torch.dtype, bases: int, lr: float | None) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and weights of 50 steps, plain and merged. lr None: by amounts that do not depend on the losses."""
    ends = []
    for managed in (False, True):
        model = TiedLM().to(dtype)
        theta = PerturbedParameters(Blocks.of(model))
        known = [basis_of(theta.blocks, seed=seed) for seed in range(bases)]
        with theta.fused_steps() if managed else torch.no_grad():
            losses = [one_step(theta, model, k, known[k // 5 % bases], lr) for k in range(50)]
        ends.append((losses, weights(model)))
    return ends


@pytest.mark.parametrize("bases", [1, 2])
def test_merged_steps_equal_plain_ones_within_roundings(bases: int):
    (plain, end), (merged, other) = both_ways(torch.float32, bases, None)
    assert plain == pytest.approx(merged, abs=5e-6)
    unit = torch.finfo(torch.float32).eps
    for name, value in end.items():
        # 50 steps of five walks, two roundings of half a unit each, that add up as a random walk does: below 4 sigma.
        bound = 4 * (50 * 5 * 2 / 12) ** 0.5 * unit * value.abs().clamp(min=0.1)
        assert ((other[name] - value).abs() <= bound).all()
    assert farthest(end, weights(TiedLM())) > 1e-3


@pytest.mark.parametrize("bases", [1, 2])
def test_merged_steps_that_learn_equal_plain_ones(bases: int):
    (plain, end), (merged, other) = both_ways(torch.float64, bases, 1e-3)
    assert plain == pytest.approx(merged, rel=1e-9)
    assert farthest(end, other) < 1e-9
    assert farthest(end, weights(TiedLM().double())) > 1e-3


def test_a_step_makes_the_noise_of_a_direction_once_in_each_walk(monkeypatch: pytest.MonkeyPatch):
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model))
    seen: list[int] = []
    genuine = l2l.params.engine.add_noise

    def counting(pieces: Any, terms: Any, *rest: Any) -> Any:
        if pieces and pieces[0].name.endswith("#basis"):
            seen.append(len({term.key for term in terms}))
        return genuine(pieces, terms, *rest)

    monkeypatch.setattr(l2l.params.engine, "add_noise", counting)
    one_step(theta, model, 0, basis_of(theta.blocks), lr=1e-3)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
@pytest.mark.parametrize("managed", [False, True])
def test_an_error_at_any_evaluation_leaves_theta_where_the_step_began(walk: Any, failing_call: int, managed: bool):
    model = TiedLM()
    theta = PerturbedParameters(Blocks.of(model), walk)
    u, v = based(theta.blocks), based(theta.blocks, key=Key(8), basis=basis_of(theta.blocks, seed=5))
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise RuntimeError("out of something")
        return model()

    with theta.fused_steps() if managed else torch.no_grad():
        one_step(theta, model, 0, u.basis, lr=1e-3)
        theta.restore()
        before = weights(model)
        with torch.no_grad(), pytest.raises(RuntimeError, match="out of something"), theta.step():
            for direction in (u, v):
                for distance in (EPSILON, -EPSILON):
                    theta.perturb(direction, distance)
                    theta.evaluate(failing)
                theta.add(direction, [0.1] * len(theta.blocks))
        assert theta.displacement.restored
        assert farthest(before, weights(model)) <= (1e-6 if walk == "in_place" else 0)


def test_exact_and_in_place_walking_evaluate_the_same():
    u, found = None, []
    for walk in ("in_place", "functional"):
        model = tiny_random("opt")
        theta = PerturbedParameters(Blocks.of(model), walk)
        u = based(theta.blocks) if u is None else u
        theta.perturb(u, 1e-2)
        with torch.no_grad():
            for _ in range(2):  # the second time copies are made many at a time
                found.append(theta.evaluate(language_loss(model)).item())
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_copies_are_made_in_inference_mode_and_out_of_it():
    model = tiny_random("opt")
    theta = PerturbedParameters(Blocks.of(model), "functional")
    u = based(theta.blocks)
    losses = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        theta.perturb(u, 1e-2)
        with mode():
            losses.append(theta.evaluate(language_loss(model)).item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_half_precision_copies_are_rounded_once(sigma: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l2l.params.engine, "RUN", 40)  # five rows at a time
    model = TiedLM().to(torch.bfloat16)
    theta = PerturbedParameters(Blocks.of(model))
    u = based(theta.blocks, sigma)
    theta.perturb(u, 1e-2)
    found = theta.evaluate(lambda: written(model))
    for name, value in formula(theta.blocks, u).items():
        wanted = (weights(model)[name].float() + (1e-2 * value).float()).to(torch.bfloat16)
        if value.ndim == 2:
            same = (found[name] == wanted).float().mean().item()
            assert same > 0.98  # a scale has 12 bits: some values round the other way
            torch.testing.assert_close(found[name], wanted, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_update_that_lands_in_half_precision_is_the_one_intended(update: Any, sigma: float, dtype: torch.dtype):
    if update == "stochastic" and dtype == torch.float16:
        pytest.skip("stochastic rounding is to bfloat16")
    linear = nn.Linear(512, 256, bias=False)
    linear.to(dtype)
    theta = PerturbedParameters(Blocks.of(linear), update=update)
    basis, before = basis_of(theta.blocks, 8), linear.weight.detach().double()
    wanted = torch.zeros_like(before)
    for step in range(20):
        u = based(theta.blocks, sigma, key=Key(1, step), basis=basis)
        with theta.step():
            theta.add(u, [1e-4])
        wanted += 1e-4 * formula(theta.blocks, u)["weight"]
    landed = theta.value(0).double() - before
    assert (torch.sum(landed * wanted) / torch.sum(wanted * wanted)).item() == pytest.approx(1, abs=0.015)
    if update == "master":
        torch.testing.assert_close(landed, wanted, rtol=1e-3, atol=1e-6)
        assert torch.equal(linear.weight.detach(), theta.value(0).to(dtype))


@pytest.mark.parametrize("update", UPDATES)
def test_an_error_after_a_move_in_half_precision_brings_the_same_bits_back(update: Any):
    model = TiedLM().to(torch.bfloat16)
    theta = PerturbedParameters(Blocks.of(model), update=update)
    u = based(theta.blocks)
    one_step(theta, model, 0, u.basis, lr=1e-3)
    before, masters = weights(model), {k: v.clone() for k, v in theta.extra_state().items()}
    with pytest.raises(RuntimeError), theta.step():
        theta.add(u, [0.1] * 6)
        theta.perturb(u, EPSILON)  # commits the move
        raise RuntimeError
    assert same_bits(before, weights(model))
    assert same_bits(masters, theta.extra_state())


@pytest.mark.parametrize("walk", ["in_place", "functional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_behind_a_step_include_the_basis(walk: Any, dtype: torch.dtype):
    if dtype == torch.bfloat16 and walk == "in_place":
        pytest.skip("half precision is walked exactly")
    model = TiedLM().to(dtype)
    theta = PerturbedParameters(Blocks.of(model), walk)
    centre = tuple(mean for mean, _ in block_moments(theta.blocks))
    u = based(theta.blocks, centre=centre)
    with theta.step():
        theta.perturb(u, EPSILON)
        theta.perturb(u, -EPSILON)
        theta.add(u, [0.3] * 6)
        found = theta.moments(u)
        waits = bool(theta.displacement.pending)
    assert waits == (walk == "functional")
    kept = [theta.value(i).double() for i in range(6)]
    for (mean, variance), value in zip(found, kept, strict=True):
        assert mean == pytest.approx(value.mean().item(), rel=1e-5, abs=1e-7)
        assert variance == pytest.approx(value.var().item(), rel=1e-5)


def test_walks_agree_within_a_rounding_whatever_the_number_of_threads():
    ends, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            linear = nn.Linear(256, 512, bias=False)
            linear.weight.data.fill_(0.1)
            theta = PerturbedParameters(Blocks.of(linear))
            theta.add(based(theta.blocks, basis=basis_of(theta.blocks, 8)), [0.1])
            ends.append(weights(linear))
    finally:
        torch.set_num_threads(threads)
    assert farthest(*ends) <= 2e-8  # a unit of weights near 0.2
