"""A tuner's sigma under other methods."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, final

import pytest
import torch
from cases import TiedLM, same_bits, weights
from torch import Tensor, nn

from l2l.methods.adam import Adam
from l2l.methods.base import Method
from l2l.methods.learned import Learned
from l2l.methods.lozo import LOZO
from l2l.methods.mezo import MeZO
from l2l.methods.wrappers.learned import LearnedWrapper
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, dense_direction
from l2l.tuners.api import Tuner
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.networks import TunerNetwork
from l2l.tuners.normalize import EnergyNormalizer

LR = 0.003


@final
class AlwaysOne(TunerNetwork):
    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        return torch.ones(len(features))


def run(model: nn.Module, method: Method[Any], steps: int = 8) -> ZOOptimizer:
    optimizer = ZOOptimizer(model, method, lr=LR)
    for _ in range(steps):
        optimizer.step(model)
    return optimizer


def with_basis(model: nn.Module) -> Tuner:
    columns = {b.name: torch.eye(b.tensor.shape[1])[:, :2] for b in Blocks.of(model) if b.tensor.ndim == 2}
    return Tuner.for_model(model, seed=5, basis=columns)


@pytest.mark.parametrize("num_directions", [1, 2])
@pytest.mark.parametrize("made", [lambda model: Tuner.for_model(model, seed=5), with_basis])
def test_around_mezo_it_is_the_learned_method_bit_for_bit(num_directions: int, made: Any):
    model, other = TiedLM(), TiedLM()
    left = run(model, LearnedWrapper(MeZO(num_directions=num_directions), made(model), horizon=8))
    right = run(other, Learned(made(other), num_directions=num_directions, horizon=8))
    assert same_bits(weights(model), weights(other))
    assert torch.equal(left.method_state.history.sigma, right.method_state.sigma)


@pytest.mark.parametrize("inner", [MeZO(), LOZO(interval=3), Adam()])
def test_a_tuner_that_says_one_is_the_method_inside(inner: Method[Any]):
    model, other = TiedLM(), TiedLM()
    tuner = Tuner(AlwaysOne(), Fingerprint.of(model), EnergyNormalizer(), "always_one", {})
    run(model, LearnedWrapper(inner, tuner))
    run(other, inner)
    assert same_bits(weights(model), weights(other))


def test_the_tuner_scales_the_directions_of_the_method_inside():
    model = TiedLM().double()
    optimizer = run(model, LearnedWrapper(LOZO(), Tuner.for_model(model, seed=5)), 1)
    assert optimizer.report is not None
    seen = optimizer.report.estimates[0].direction
    plain = LOZO().direction(optimizer.blocks, None, seen.key)
    for i in range(len(optimizer.blocks)):
        want = seen.factor * seen.sigma[i] * dense_direction(plain, optimizer.blocks, i)
        torch.testing.assert_close(dense_direction(seen, optimizer.blocks, i), want)
    assert len(set(seen.sigma)) > 1


@pytest.mark.parametrize("inner", [LOZO(interval=3), Adam()])
def test_both_states_are_saved_and_a_resumed_run_goes_on_bit_for_bit(inner: Method[Any]):
    model = TiedLM()
    optimizer = run(model, LearnedWrapper(inner, Tuner.for_model(model, seed=5)), 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved, resumed = torch.load(file, weights_only=True), TiedLM()
    again = ZOOptimizer(resumed, LearnedWrapper(inner, Tuner.for_model(resumed, seed=5)), lr=LR)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(4):
        optimizer.step(model)
        again.step(resumed)
    assert same_bits(weights(model), weights(resumed))
    assert torch.equal(again.method_state.history.sigma, optimizer.method_state.history.sigma)


def test_a_tuner_with_a_basis_and_a_method_with_directions_of_its_own_refuse_each_other():
    model = TiedLM()
    before = weights(model)
    optimizer = ZOOptimizer(model, LearnedWrapper(LOZO(), with_basis(model)), lr=LR)
    with pytest.raises(ValueError, match="along a basis or a shape, not both: take a tuner without a basis"):
        optimizer.step(model)
    assert same_bits(before, weights(model))
