"""The learned method: MeZO until something is learned, its memory of the run, and noise inside a basis."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cases import Problem, TiedLM, same_bits, weights
from torch import Tensor, nn

from l2l.methods.base import Method
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.model import random_basis
from l2l.tuners.normalize import CurvatureNormalizer, EnergyNormalizer, NoNormalizer

STARTS: list[tuple[str, dict[str, Any]]] = [
    ("per_block_mlp", {"start": "mezo"}),
    ("per_block_mlp", {"start": "mezo", "features": "standard"}),
    ("shared_mlp", {"features": "standard"}),
    ("shared_mlp", {"features": "standard", "embedding": 3}),
    ("shared_mlp", {}),
    ("table", {}),
]


def run(model: nn.Module, method: Method[Any], steps: int = 6) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = ZOOptimizer(model, method, lr=0.01, seed=3)
    return [optimizer.step(model) for _ in range(steps)], weights(model)


@pytest.mark.parametrize(("architecture", "options"), STARTS)
@pytest.mark.parametrize("num_directions", [1, 2])
def test_a_tuner_that_starts_as_mezo_is_mezo_bit_for_bit(
    problem: Problem, architecture: str, options: dict[str, Any], num_directions: int
):
    model = problem.make()
    traces = dict.fromkeys(Blocks.of(model).names, 0.3)
    for normalizer in (EnergyNormalizer(), CurvatureNormalizer(traces), NoNormalizer()):
        model = problem.make()
        tuner = Tuner.for_model(model, architecture, normalizer=normalizer, **options)
        losses, end = run(model, Learned(tuner, num_directions=num_directions, horizon=10))
        wanted, there = run(problem.make(), MeZO(num_directions=num_directions))
        assert losses == wanted
        assert same_bits(end, there)


def test_a_run_remembers_what_its_features_need():
    model = TiedLM()
    tuner = Tuner.for_model(model, "shared_mlp", features="standard", start="random")
    optimizer = ZOOptimizer(model, Learned(tuner, num_directions=2, horizon=50), lr=0.01)
    reports = []
    for _ in range(3):
        optimizer.step(model)
        reports.append(optimizer.report)
    state = optimizer.method_state
    assert isinstance(state, RunStatistics)
    assert (state.step, state.horizon) == (3, 50)
    assert state.loss[0] == pytest.approx(reports[0].loss)
    slopes = [abs(estimate.projected_gradient) for estimate in reports[0].estimates]
    assert state.gradient[0] == pytest.approx(sum(slopes) / 2)
    assert state.loss_plus == reports[-1].estimates[-1].loss_plus
    assert state.sigma.tolist() == pytest.approx(list(reports[-1].estimates[-1].direction.sigma))


def test_a_run_with_standard_features_resumes_exactly():
    model, other = TiedLM(), TiedLM()
    tuner = Tuner.for_model(model, "shared_mlp", features="standard", start="random", seed=2)
    whole = ZOOptimizer(model, Learned(tuner, horizon=8), lr=0.01)
    for _ in range(4):
        whole.step(model)
    kept, at = copy.deepcopy(whole.state_dict()), weights(model)
    other.load_state_dict(at, strict=False)
    resumed = ZOOptimizer(other, Learned(tuner, horizon=8), lr=0.01)
    resumed.load_state_dict(kept)
    for _ in range(4):
        whole.step(model)
        resumed.step(other)
    assert same_bits(weights(model), weights(other))


def test_a_state_saved_without_the_new_entries_is_refused():
    model = TiedLM()
    optimizer = ZOOptimizer(model, Learned(Tuner.for_model(model)))
    kept = optimizer.state_dict()
    del kept["zeroth_order"]["method"]["constants"]
    with pytest.raises(ValueError, match="the saved method state does not fit RunStatistics"):
        optimizer.load_state_dict(kept)


@pytest.mark.parametrize("horizon", [0, -3, 2.5])
def test_a_horizon_is_a_whole_number(horizon: Any):
    with pytest.raises(ValueError, match=f"horizon={horizon} must be a whole number"):
        Learned(Tuner.for_model(TiedLM()), horizon=horizon)


def with_basis(model: nn.Module, **options: Any) -> Tuner:
    return Tuner.for_model(model, "table", basis=random_basis(Blocks.of(model), 2), **options)


def test_a_direction_carries_the_basis_and_its_sigma():
    model = TiedLM()
    tuner, blocks = with_basis(model, basis_start=0.5), Blocks.of(model)
    method = Learned(tuner)
    direction = method.direction(blocks, method.init(blocks), Key(0))
    assert direction.basis is tuner.basis_for(blocks)
    assert direction == method.direction(blocks, method.init(blocks), Key(0))
    assert direction.sigma == (1.0,) * 6
    for name, sigma in zip(blocks.names, direction.basis_sigma, strict=True):
        assert sigma == pytest.approx(0.5 if name in (tuner.basis or {}) else 0.0)
    counts = EnergyNormalizer().counts(blocks).tolist()
    pairs = zip(counts, direction.sigma, direction.basis_sigma, strict=True)
    spent = sum(count * (dense**2 + inside**2) for count, dense, inside in pairs)
    assert direction.factor == pytest.approx((sum(counts) / spent) ** 0.5)


def test_a_run_with_a_basis_descends_and_repeats_bit_for_bit():
    ends = []
    for _ in range(2):
        model = TiedLM()
        first = model().item()
        _, end = run(model, Learned(with_basis(model)), steps=80)
        assert model().item() < first
        ends.append(end)
    assert same_bits(*ends)


def test_with_two_outputs_and_no_basis_the_noise_is_dense():
    model = TiedLM()
    tuner = Tuner.for_model(model, "table", outputs=2)
    losses, end = run(model, Learned(tuner))
    wanted, there = run(TiedLM(), MeZO())
    assert losses == wanted
    assert same_bits(end, there)
