"""PseuZO against its paper, and where the released code is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LogisticRegression, Quadratic, TiedLM, farthest, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from l2l.methods.pseuzo import PseuZO, PseuZOState
from l2l.noise import Distribution, Key, standard_noise
from l2l.optim import ZOOptimizer

LR, EPSILON, SEED = 0.01, 1e-3, 4
Weights = dict[str, Tensor]


class Model(nn.Module):
    """Some rows in, logits out; and the loss of the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def logits(self) -> Tensor:
        model = self.inner
        if isinstance(model, TiedLM):
            x = model.embed(model.tokens)
            return model.head(model.norm(x + model.attention(x)))
        assert isinstance(model, LogisticRegression)
        return model.linear(model.x)

    def loss(self, logits: Tensor) -> Tensor:
        model = self.inner
        if isinstance(model, TiedLM):
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1), model.tokens[:, 1:].flatten())
        assert isinstance(model, LogisticRegression)
        return functional.cross_entropy(logits, model.y)

    def forward(self) -> Tensor:
        return self.logits()


def moved(at: Weights, by: float, u: Weights) -> Weights:
    return {name: value + by * u[name] for name, value in at.items()}


def noise(at: Weights, step: int, distribution: Distribution = "gaussian") -> Weights:
    key = Key(SEED, step)
    return {n: standard_noise(n, key, v.shape, distribution, torch.float64) for n, v in at.items()}


@pytest.mark.parametrize(("window", "decay"), [(1, 0.5), (4, 0.5), (3, 0.0)])
@pytest.mark.parametrize("make", [LogisticRegression, TiedLM])
def test_it_takes_the_steps_of_the_paper(make: type[nn.Module], window: int, decay: float):
    model = Model(make())
    at, past = weights(model), []

    def outputs(where: Weights) -> Tensor:
        return functional_call(model, where, (), tie_weights=True).detach()

    optimizer = ZOOptimizer(model, PseuZO(EPSILON, window=window, decay=decay), LR, SEED)
    for step in range(20):
        optimizer.step(lambda: model.loss(model.logits()))
        z = noise(at, step)
        out = outputs(at).requires_grad_()
        e = torch.autograd.grad(model.loss(out), out)[0]
        past = [(z, outputs(moved(at, EPSILON, z)) - outputs(at)), *past][:window]
        for age, (u, change) in enumerate(past):
            at = moved(at, -LR * decay**age * (e * change).sum().item() / EPSILON, u)
        assert farthest(weights(model), at) < 1e-6


def one_sided(model: nn.Module, steps: int, loss=lambda model: model()) -> Weights:
    """theta - lr * (L+ - L0) / epsilon * z, written out."""
    at = weights(model)
    for step in range(steps):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(at[name])
            home, z = float(loss(model)), noise(at, step)
            for name, parameter in model.named_parameters():
                parameter.add_(EPSILON * z[name])
            at = moved(at, -LR * (float(loss(model)) - home) / EPSILON, z)
    return at


def test_where_no_outputs_can_be_told_it_is_the_one_sided_estimate():
    model = Quadratic().double()
    optimizer = ZOOptimizer(model, PseuZO(EPSILON, window=1), LR, SEED)
    for _ in range(20):
        optimizer.step(model)
    assert farthest(weights(model), one_sided(Quadratic().double(), 20)) < 1e-9


def test_behind_a_float_it_is_the_one_sided_estimate():
    model = TiedLM().double()
    optimizer = ZOOptimizer(model, PseuZO(EPSILON, window=1), LR, SEED)
    for _ in range(5):
        optimizer.step(lambda: model().item())
    assert farthest(weights(model), one_sided(TiedLM().double(), 5)) < 1e-9


def test_where_both_passes_take_different_ways_it_is_the_one_sided_estimate():
    model, calls = TiedLM().double(), 0

    def turning() -> Tensor:
        nonlocal calls
        calls += 1
        tokens = model.tokens[: 4 - calls % 2]
        x = model.embed(tokens)
        return functional.cross_entropy(model.head(model.norm(x)).flatten(0, 1), tokens.flatten())

    optimizer = ZOOptimizer(model, PseuZO(), LR, SEED)
    optimizer.step(turning)
    assert optimizer.report is not None
    seen = optimizer.report.estimates[0]
    assert seen.loss_center is not None
    assert seen.projected_gradient == (seen.loss_plus - seen.loss_center) / 1e-3
    assert optimizer.method_state == PseuZOState()


@pytest.mark.parametrize("make", [LogisticRegression, TiedLM])
def test_it_differs_from_the_one_sided_estimate_by_the_bend_of_the_loss_alone(make: type[nn.Module]):
    gaps = []
    for epsilon in (1e-2, 5e-3, 2.5e-3):
        model = make().double()
        optimizer = ZOOptimizer(model, PseuZO(epsilon), 1e-9, SEED)
        optimizer.step(model)
        assert optimizer.report is not None
        seen = optimizer.report.estimates[0]
        assert seen.loss_center is not None
        gaps.append(abs(seen.projected_gradient - (seen.loss_plus - seen.loss_center) / epsilon))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


def test_what_moving_a_tied_head_does_is_seen():
    """The hidden state as output would not show it; the one-sided estimate does."""
    model = TiedLM().double()
    for parameter in (*model.attention.parameters(), *model.norm.parameters()):
        parameter.requires_grad_(False)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)  # the hidden state is the same whatever the embedding is
    optimizer = ZOOptimizer(model, PseuZO(1e-6), LR, SEED)
    optimizer.step(model)
    assert optimizer.report is not None
    seen = optimizer.report.estimates[0]
    assert seen.loss_center is not None and abs(seen.projected_gradient) > 1e-2
    assert seen.projected_gradient == pytest.approx((seen.loss_plus - seen.loss_center) / 1e-6, rel=1e-3)


def test_rademacher_noise_is_plus_or_minus_one():
    model, seen = TiedLM().double(), []

    def watched() -> Tensor:
        seen.append(model.head.weight.detach().clone())
        return model()

    ZOOptimizer(model, PseuZO(EPSILON, "rademacher"), LR, SEED).step(watched)
    offsets = ((seen[1] - seen[0]) / EPSILON).round(decimals=6)
    assert set(offsets.unique().tolist()) == {-1.0, 1.0}


def test_the_window_holds_no_more_steps_and_bytes_than_it_may():
    change = 4 * 7 * 24 * 4
    for method, kept in ((PseuZO(window=3), 2), (PseuZO(window=1), 0), (PseuZO(window_bytes=change), 1)):
        model = TiedLM()
        optimizer = ZOOptimizer(model, method, LR, SEED)
        for _ in range(5):
            optimizer.step(model)
        state = optimizer.method_state
        assert isinstance(state, PseuZOState)
        assert state.steps == tuple(range(4, 4 - kept, -1)) and not state.pulled
        assert all(tensor.nbytes == change for held in state.changes for tensor in held)
        assert kept * change <= method.state_bytes(optimizer.blocks) or not kept


@pytest.mark.parametrize("length", [4, 7])
def test_changes_of_longer_and_shorter_batches_are_cut_from_their_ends(length: int):
    model = TiedLM().double()

    def batch(width: int) -> Tensor:
        x = model.embed(model.tokens[:, :width])
        return functional.cross_entropy(model.head(model.norm(x)).flatten(0, 1), model.tokens[:, :width].flatten())

    optimizer = ZOOptimizer(model, PseuZO(EPSILON, window=2), LR, SEED)
    optimizer.step(lambda: batch(6))
    change = optimizer.method_state.changes[0][0]
    start = weights(model)
    x = model.head(model.norm(model.embed(model.tokens[:, :length]))).detach().requires_grad_()
    loss = functional.cross_entropy(x.flatten(0, 1), model.tokens[:, :length].flatten())
    e, common = torch.autograd.grad(loss, x)[0], min(length, 6)
    older = 0.5 * (e[:, -common:] * change[:, -common:]).sum().item() / EPSILON
    optimizer.step(lambda: batch(length))
    assert optimizer.report is not None
    wanted = moved(start, -LR * optimizer.report.projected_gradient, noise(start, 1))
    assert farthest(weights(model), moved(wanted, -LR * older, noise(start, 0))) < 1e-9


def test_values_that_make_no_sense_are_refused():
    nothing: dict[str, Any] = {"window": 0, "window_bytes": 0}
    for name in nothing:
        with pytest.raises(ValueError, match=f"{name}=0 must be a whole number"):
            PseuZO(**{name: nothing[name]})
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"decay={decay} must be at least 0 and below 1"):
            PseuZO(decay=decay)
    with pytest.raises(ValueError, match="epsilon=0 must be positive"):
        PseuZO(epsilon=0)
