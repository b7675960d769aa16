"""The loss after zeroth-order steps: its lean meta-gradient against the textbook's, in a fraction of the memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from bowl import Bowl, basis, close, meta_gradient, point_on, slopes, tuner_of, weights_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from l2l.estimators import Closure, consume_gradients
from l2l.meta.objectives.one_step_loss import HeldOutLoss, OneStepLoss, UnrolledLoss
from l2l.meta.state import MetaLoss, MetaState
from l2l.meta.trajectory import accumulate_velocity, inner_key, momentum_step, zero_velocity
from l2l.methods.learned import Learned
from l2l.models.shapes import tiny_random
from l2l.noise import Key, standard_noise
from l2l.optim import zo_step
from l2l.params import Blocks, PerturbedParameters
from l2l.params.direction import low_rank_noise
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


def test_the_gradient_behind_the_step_can_drive_the_trajectory_as_well():
    """The velocity is then that of the gradient at theta', taken in the same backward pass, and theta is back first."""
    model = tiny_random("llama").double()
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    theta = PerturbedParameters(Blocks.of(model))
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
        consume=accumulate_velocity(velocity, 0.5),
    )
    for block, kept in zip(theta.blocks, before, strict=True):
        torch.testing.assert_close(block.flat, kept, rtol=1e-12, atol=1e-14)
    seen = outcome.report.estimates[0]
    theta.add(seen.direction, [-1e-2 * seen.projected_gradient] * len(theta.blocks))
    language_loss(model, ids).backward()
    for i, block in enumerate(theta.blocks):
        assert block.tensor.grad is not None
        torch.testing.assert_close(velocity[i], 0.5 * 2.0 + block.tensor.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("inside", [None, basis()], ids=["dense", "with a basis"])
def test_the_published_gradient_is_exact_in_both_outputs(inside: Tensor | None):
    model = Bowl()
    point = point_on(model, tuner_of(model, inside), lr=0.1)
    outcome = OneStepLoss()(point)
    seen = outcome.report.estimates[0]
    amount = -point.lr * seen.projected_gradient * seen.direction.factor
    noise = [standard_noise(b.name, point.key, b.tensor.shape, dtype=torch.float64) for b in point.theta.blocks]
    along = [torch.zeros(6, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
    if inside is not None:
        along[0] = low_rank_noise("matrix", inside.double(), point.key, 6)
    sigma = torch.tensor(seen.direction.sigma, dtype=torch.float64, requires_grad=True)
    inner = torch.tensor(seen.direction.basis_sigma or (0.0, 0.0), dtype=torch.float64, requires_grad=True)
    moved = [p.detach() + amount * (sigma[i] * noise[i] + inner[i] * along[i]) for i, p in enumerate(model.parameters())]
    x = torch.cat([part.reshape(-1) for part in moved])
    (0.5 * x @ model.hessian @ x + model.tilts[0] @ x).backward()
    assert outcome.sigma_gradient is not None and sigma.grad is not None and inner.grad is not None
    torch.testing.assert_close(outcome.sigma_gradient.double(), sigma.grad, rtol=1e-4, atol=1e-7)
    if inside is not None:
        assert outcome.basis_gradient is not None
        torch.testing.assert_close(outcome.basis_gradient.double(), inner.grad, rtol=1e-4, atol=1e-7)
        assert outcome.basis_gradient[1] == 0


def test_one_unrolled_step_is_the_held_out_objective():
    found = []
    for objective in (UnrolledLoss(steps=1), HeldOutLoss(), OneStepLoss()):
        model = Bowl()
        found.append(objective(point_on(model, tuner_of(model))))
    one, held, published = found
    assert one.value == held.value != published.value
    assert torch.equal(slopes(one), slopes(held))


def test_unrolled_steps_are_those_of_a_run_and_each_has_its_share_of_the_gradient():
    model, steps = Bowl(), 3
    point = point_on(model, tuner_of(model), lr=1e-3)
    before = weights_of(model)
    outcome = UnrolledLoss(steps=steps)(point)
    history, state = point.history, []
    for number in range(steps):
        features = point.method.tuner.features(history)
        history, report = zo_step(
            lambda number=number: model(0 if number == 0 else 1 + number),
            point.theta,
            point.method,
            history,
            inner_key(point.key, number),
            [point.lr] * 2,
        )
        state.append((features, report))
    assert outcome.value == pytest.approx(model(1).item(), rel=1e-12)
    last = model.gradient(1)
    network, parts = point.method.tuner.network, []
    for features, report in state:
        seen = report.estimates[0]
        dots = [
            torch.sum(standard_noise(b.name, report.key, b.tensor.shape, dtype=torch.float64) * g)
            for b, g in zip(point.theta.blocks, last, strict=True)
        ]
        slope = -point.lr * seen.projected_gradient * seen.direction.factor * torch.stack(dots)
        parts.append(torch.sum(point.method.tuner.sigma(features, point.theta.blocks.names) * slope.float()))
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(torch.stack(parts).sum(), list(network.parameters()))])
    torch.testing.assert_close(meta_gradient(outcome, network).float(), expected, rtol=1e-4, atol=1e-8)
    assert not close(model, before)


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
    velocity = zero_velocity(blocks)

    def plain() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        language_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    def meta() -> None:
        def closure() -> Tensor:
            return language_loss(model, ids)

        one_step(closure, theta, method, RunStatistics.start(blocks), Key(0), 1e-3)
        momentum_step(closure, theta, velocity, 1e-3)

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
