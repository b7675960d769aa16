"""The lean meta-gradient against the textbook one: same numbers, a fraction of the memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from l2l.estimators.backward import consume_gradients
from l2l.estimators.finite_difference import Closure
from l2l.meta.objectives.base import MetaLoss, MetaState
from l2l.meta.objectives.published import OneStepLoss
from l2l.meta.trajectory import TrajectoryConfig, accelerate, at_rest, momentum_step
from l2l.methods.learned import Learned
from l2l.models.shapes import tiny_random
from l2l.noise import Key, standard_noise
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def one_step(
    closure: Closure,
    theta: PerturbedParameters,
    method: Learned,
    history: RunStatistics,
    key: Key,
    lr: float,
    consume: Any = None,
) -> MetaLoss:
    return OneStepLoss()(MetaState(closure, closure, lambda i: closure, theta, method, history, key, lr, consume))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_lean_meta_gradient_equals_functional_call(family: str):
    model = tiny_random(family).double()
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    theta = PerturbedParameters(Blocks.of(model))
    method = Learned(Tuner.for_model(model, seed=3))
    key, lr = Key(5, 7), 1e-2

    outcome = one_step(lambda: language_loss(model, ids), theta, method, RunStatistics.start(theta.blocks), key, lr)

    estimate = outcome.report.estimates[0]
    assert outcome.sigma_gradient is not None
    sigma = torch.tensor(estimate.direction.sigma, dtype=torch.float64, requires_grad=True)
    moved = {}
    for i, block in enumerate(theta.blocks):
        noise = standard_noise(block.name, key, block.tensor.shape, dtype=torch.float64)
        scale = lr * estimate.projected_gradient * estimate.direction.factor
        moved[block.name] = block.tensor.detach() - scale * sigma[i] * noise
    arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
    loss = functional_call(model, moved, kwargs=arguments, tie_weights=True).loss
    (expected,) = torch.autograd.grad(loss, sigma)

    assert outcome.loss == pytest.approx(loss.item(), rel=1e-9)
    difference = torch.linalg.vector_norm(outcome.sigma_gradient.double() - expected)
    assert difference <= 1e-5 * torch.linalg.vector_norm(expected)


def test_the_meta_gradient_is_the_slope_of_the_loss_after_the_step():
    # A float64 network throughout: transformers computes norms and losses in float32.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data, labels = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    theta = PerturbedParameters(Blocks.of(model))
    method = Learned(Tuner.for_model(model, seed=1))
    key, lr, width = Key(1), 0.1, 1e-4

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(data), labels)

    outcome = one_step(loss, theta, method, RunStatistics.start(theta.blocks), key, lr)
    estimate = outcome.report.estimates[0]
    amount = -lr * estimate.projected_gradient * estimate.direction.factor

    def loss_with(index: int, change: float) -> float:
        moved = {
            block.name: block.tensor.detach()
            + amount
            * (estimate.direction.sigma[i] + (change if i == index else 0.0))
            * standard_noise(block.name, key, block.tensor.shape, dtype=torch.float64)
            for i, block in enumerate(theta.blocks)
        }
        return nn.functional.cross_entropy(functional_call(model, moved, (data,)), labels).item()

    assert outcome.sigma_gradient is not None
    for index in range(len(theta.blocks)):
        slope = (loss_with(index, width) - loss_with(index, -width)) / (2 * width)
        assert outcome.sigma_gradient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-10)


def test_theta_is_where_it_was_after_the_objective_and_after_an_error_in_it():
    model = tiny_random("llama")
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    theta = PerturbedParameters(Blocks.of(model))
    method = Learned(Tuner.for_model(model))
    before = [block.flat.clone() for block in theta.blocks]
    one_step(lambda: language_loss(model, ids), theta, method, RunStatistics.start(theta.blocks), Key(0), 1e-3)
    calls = []

    def breaks_in_the_backward_pass() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return language_loss(model, ids)

    with pytest.raises(RuntimeError, match="out of memory"):
        one_step(breaks_in_the_backward_pass, theta, method, RunStatistics.start(theta.blocks), Key(0), 1e-3)
    for block, kept in zip(theta.blocks, before, strict=True):
        assert torch.linalg.vector_norm(block.flat - kept) <= 1e-6 * (1 + torch.linalg.vector_norm(kept))
        assert block.tensor.grad is None


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside it that are alive, and their peak."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}  # views of these are not new memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._seen:
            self._seen.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def peak_beside(known: list[Tensor], work) -> int:
    with LiveBytes(known) as meter:
        work()
    return meter.peak


def test_a_meta_step_needs_little_more_memory_than_a_plain_first_order_step():
    model = tiny_random("llama", hidden_size=256, intermediate_size=768, vocab_size=1024, num_hidden_layers=6)
    ids = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(0))
    blocks = Blocks.of(model)
    theta, method = PerturbedParameters(blocks), Learned(Tuner.for_model(model))
    weights = sum(block.numel * 4 for block in blocks)
    velocity, config = at_rest(blocks), TrajectoryConfig()

    def plain() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        language_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    def meta() -> None:
        def closure() -> Tensor:
            return language_loss(model, ids)

        one_step(closure, theta, method, RunStatistics.start(blocks), Key(0), 1e-3)
        momentum_step(closure, theta, velocity, 1e-3, config)

    def textbook() -> None:
        noise = [standard_noise(b.name, Key(0), b.tensor.shape) for b in blocks]
        sigma = torch.ones(len(blocks), requires_grad=True)
        moved = {b.name: b.tensor.detach() - 1e-3 * sigma[i] * noise[i] for i, b in enumerate(blocks)}
        arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
        functional_call(model, moved, kwargs=arguments, tie_weights=True).loss.backward()

    parameters = list(model.parameters())
    first_order = weights + peak_beside(parameters, plain)
    ours = weights + weights + peak_beside([*parameters, *velocity.values()], meta)  # weights, velocity, the rest
    assert ours <= 1.25 * first_order
    assert ours < 0.5 * (weights + weights + peak_beside(parameters, textbook))  # which needs a velocity too


def test_the_gradient_of_a_tied_embedding_is_added_up_in_place():
    """Its two parts, from the head and from the rows looked up, and no third tensor of that size."""
    model = tiny_random("gpt2", vocab_size=4096, n_embd=256)
    ids = torch.randint(0, 4096, (2, 4), generator=torch.Generator().manual_seed(0))
    blocks = Blocks.of(model)
    table = next(block.tensor for block in blocks if block.tensor.shape[0] == 4096)
    assert sum(p is table for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)) == 2

    # The profiler, because a dispatch mode holds on to tensors, and what is held is not added to in place.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        consume_gradients(lambda: language_loss(model, ids), blocks, lambda index, gradient: None)
    large = [event.name for event in seen.events() if event.self_cpu_memory_usage >= table.numel() * 4]
    assert "aten::mm" in large
    assert "aten::add" not in large


def test_the_trajectory_is_sgd_with_momentum_where_nothing_is_clipped():
    ours, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(ours.state_dict())
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    theta = PerturbedParameters(Blocks.of(ours))
    velocity, config = at_rest(theta.blocks), TrajectoryConfig(lr=0.1, momentum=0.8, clip=1e6)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.8)
    for _ in range(5):
        momentum_step(lambda: ours(data).square().mean(), theta, velocity, 0.1, config)
        sgd.zero_grad()
        reference(data).square().mean().backward()
        sgd.step()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_trajectory_limits_the_velocity_and_falls_to_zero_before_each_restart():
    config = TrajectoryConfig(lr=0.5, momentum=0.5, clip=0.1, restart_every=4)
    assert [config.lr_at(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.5, 0.375]
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    theta = PerturbedParameters(Blocks.of(model))
    momentum_step(lambda: 1e3 * model.weight.sum(), theta, at_rest(theta.blocks), 1.0, config)
    assert torch.linalg.vector_norm(model.weight - before).item() == pytest.approx(0.1 / 0.5, rel=1e-5)


def test_the_gradient_behind_the_step_can_drive_the_trajectory_as_well():
    """The velocity is then that of the gradient at theta', taken in the same backward pass, and theta is back first."""
    model = tiny_random("llama").double()
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    theta, config = PerturbedParameters(Blocks.of(model)), TrajectoryConfig(momentum=0.5)
    method = Learned(Tuner.for_model(model, seed=3))
    velocity = {i: torch.full_like(block.tensor.detach(), 2.0) for i, block in enumerate(theta.blocks)}
    before = [block.flat.clone() for block in theta.blocks]
    outcome = one_step(
        lambda: language_loss(model, ids),
        theta,
        method,
        RunStatistics.start(theta.blocks),
        Key(5),
        1e-2,
        consume=accelerate(velocity, config),
    )
    for block, kept in zip(theta.blocks, before, strict=True):
        torch.testing.assert_close(block.flat, kept, rtol=1e-12, atol=1e-14)
    seen = outcome.report.estimates[0]
    theta.add(seen.direction, [-1e-2 * seen.projected_gradient] * len(theta.blocks))
    language_loss(model, ids).backward()
    for i, block in enumerate(theta.blocks):
        assert block.tensor.grad is not None
        torch.testing.assert_close(velocity[i], 0.5 * 2.0 + block.tensor.grad, rtol=1e-7, atol=1e-10)
