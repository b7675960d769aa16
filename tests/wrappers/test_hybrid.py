"""Backpropagation in the last layers: their gradient is exact, and only their activations are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TiedLM, same_bits, weights
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from l2l.estimators import MicroBatched
from l2l.methods.adam import Adam
from l2l.methods.base import FirstOrder, Method
from l2l.methods.lozo import LOZO
from l2l.methods.mezo import MeZO
from l2l.methods.sgd import SGD
from l2l.methods.wrappers.hybrid import Hybrid
from l2l.methods.wrappers.learned import LearnedWrapper
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.params import Blocks
from l2l.tuners.api import Tuner

LR, EPSILON = 0.01, 1e-3


class Deep(nn.Module):
    """An embedding, six numbered layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(9, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 3)

    def forward(self) -> Tensor:
        x = self.embed(torch.arange(9))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(self.norm(x)), torch.arange(9) % 3)


def run(model: nn.Module, method: Method[Any] | FirstOrder[Any], steps: int = 8, lr: float = LR) -> ZOOptimizer:
    optimizer = ZOOptimizer(model, method, lr=lr)
    for _ in range(steps):
        optimizer.step(model)
    return optimizer


def test_the_last_layers_and_what_follows_all_layers_go_by_backpropagation():
    blocks = Blocks.of(Deep())
    behind = ["norm.weight", "norm.bias", "head.weight", "head.bias"]

    def last(**args: Any) -> list[str]:
        return [blocks.names[i] for i in sorted(Hybrid(MeZO(), **args).last(blocks))]

    assert last(layers=0) == []
    assert last(layers=1) == ["layers.5.weight", "layers.5.bias", *behind]
    assert len(last(layers=3)) == 6 + 4
    assert last(layers=6) == list(blocks.names)
    assert last(match="^head") == ["head.weight", "head.bias"]


def test_a_step_is_mezo_in_the_first_layers_and_sgd_in_the_last_at_one_theta():
    model, twin = Deep().double(), Deep().double()
    method = Hybrid(MeZO(EPSILON), layers=2, fo_lr=30.0)
    optimizer = ZOOptimizer(model, method, LR)
    last = {optimizer.blocks.names[i] for i in method.last(optimizer.blocks)}
    for step in range(20):
        optimizer.step(model)
        parameters = dict(twin.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(twin(), list(parameters.values())), strict=True))
        with torch.no_grad():
            z = {
                n: standard_noise(n, Key(0, step), p.shape, dtype=torch.float64) for n, p in parameters.items() if n not in last
            }
            losses = []
            for by in (EPSILON, -2 * EPSILON, EPSILON):
                for n in z:
                    parameters[n].add_(z[n], alpha=by)
                losses.append(twin().item())
            g = (losses[0] - losses[1]) / (2 * EPSILON)
            for n, p in parameters.items():
                p.sub_(30 * LR * gradients[n] if n in last else LR * g * z[n])
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[name], rtol=0, atol=1e-6)
    assert optimizer.report is not None
    assert optimizer.report.passes == method.passes == 5


@pytest.mark.parametrize("inner", [MeZO(), LOZO(interval=3), Adam()])
def test_without_layers_it_is_the_method_inside_bit_for_bit(inner: Method[Any]):
    model, other = Deep(), Deep()
    bare = Hybrid(inner, layers=0)
    left, _ = run(model, bare), run(other, inner)
    assert same_bits(weights(model), weights(other))
    assert left.report is not None and left.report.passes == bare.passes == inner.passes


def test_with_all_layers_it_is_sgd_bit_for_bit():
    model, other = Deep(), Deep()
    run(model, Hybrid(MeZO(), layers=99, fo_lr=2.0), lr=0.25)
    run(other, SGD(), lr=0.5)
    assert same_bits(weights(model), weights(other))


def test_only_the_activations_of_the_last_layers_are_stored():
    def stored(method: Method[Any] | FirstOrder[Any]) -> int:
        model, sizes = Deep(), []
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                sizes.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            run(model, method, 1)
        return sum(sizes)

    whole, one, three = stored(SGD()), stored(Hybrid(MeZO(), layers=1)), stored(Hybrid(MeZO(), layers=3))
    assert stored(MeZO()) == 0
    assert 0 < one < three < whole
    assert one < 0.5 * whole


def test_micro_batches_are_gone_back_through_one_by_one_and_count_as_one_pass():
    """No two pieces' activations are held at a time, and the step is that of the whole batch."""
    model, whole, held, most = Deep().double(), Deep().double(), [], []

    def piece(rows: slice) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            x = model.embed(torch.arange(9)[rows])
            for layer in model.layers:
                x = x + torch.tanh(layer(x))
            logits = model.head(model.norm(x))
            if logits.requires_grad:
                held.append(rows)
                most.append(len(held))
                logits.register_hook(lambda gradient: (held.remove(rows), gradient)[1])
            return nn.functional.cross_entropy(logits, torch.arange(9)[rows] % 3) / 3

        return loss

    one, other = ZOOptimizer(model, Hybrid(MeZO()), LR), ZOOptimizer(whole, Hybrid(MeZO()), LR)
    for _ in range(3):
        one.step(MicroBatched(tuple(piece(slice(at, at + 3)) for at in (0, 3, 6))))
        other.step(whole)
        assert one.report is not None and one.report.passes == 5
    assert most == [1] * 9
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=1e-9)


def test_no_gradient_is_left_and_what_requires_one_stays_so_also_after_an_error():
    model = Deep()
    optimizer = run(model, Hybrid(MeZO()), 2)
    calls, before = [], weights(model)

    def failing() -> Tensor:
        calls.append(torch.is_grad_enabled())
        if calls[-1]:
            raise RuntimeError("in the backward pass")
        return model()

    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    assert calls == [False, False, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert max((weights(model)[n] - v).abs().max().item() for n, v in before.items()) < 1e-6


def test_what_has_no_gradient_is_refused_in_words():
    model = Deep()
    before = weights(model)
    optimizer = ZOOptimizer(model, Hybrid(MeZO()), LR)
    with pytest.raises(ValueError, match=r"hybrid needs the gradient of what is minimised.*use objective loss"):
        optimizer.step(lambda: model().item())
    assert max((weights(model)[n] - v).abs().max().item() for n, v in before.items()) < 1e-6


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = Deep()
    before = weights(model)
    optimizer = ZOOptimizer(model, Hybrid(MeZO()), LR)

    def closure() -> Tensor:
        return model() + (model.head.bias[0] - model.head.bias[0].detach()).abs().sqrt()

    with pytest.raises(FloatingPointError, match="norm of the gradient is nan"):
        optimizer.step(closure)
    assert max((weights(model)[n] - v).abs().max().item() for n, v in before.items()) < 1e-6


def test_half_precision_weights_take_both_kinds_of_step():
    model = Deep().bfloat16()
    start = weights(model)
    optimizer = ZOOptimizer(model, Hybrid(MeZO(), layers=1, fo_lr=10.0), 0.02)
    for _ in range(40):
        optimizer.step(lambda: model().float())
    assert all(not torch.equal(start[name], value) for name, value in weights(model).items())


def test_it_goes_under_a_tuner_whose_basis_or_sigma_never_reaches_the_last_layers():
    model = TiedLM()
    before = model().item()
    optimizer = run(model, LearnedWrapper(Hybrid(LOZO(), layers=1, fo_lr=10.0), Tuner.for_model(model, seed=5)), 40)
    assert optimizer.report is not None
    sigma = dict(zip(optimizer.blocks.names, optimizer.report.estimates[0].direction.sigma, strict=True))
    assert sigma["norm.weight"] == sigma["norm.bias"] == 0 and sigma["embed.weight"] > 0
    assert model().item() < before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"layers": -1}, "layers=-1 must be a whole number, at least 0"),
        ({"fo_lr": 0.0}, "fo_lr=0.0 must be positive"),
        ({"match": "nowhere"}, "match='nowhere' takes no block"),
    ],
)
def test_bad_values_are_refused(args: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ZOOptimizer(Deep(), Hybrid(MeZO(), **args))
