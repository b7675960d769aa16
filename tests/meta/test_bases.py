"""Sources of a basis: it holds the common part of gradients and of inputs, and computing it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from bowl import weights_of
from cases import TiedLM, same_bits, weights
from torch import Tensor, nn

import l2l
from l2l.estimators import consume_gradients
from l2l.meta.bases import (
    Losses,
    activation_basis,
    candidates,
    gradient_basis,
    leading,
    linear_layers,
    mean_gradient_grams,
    pool_basis,
)
from l2l.meta.config import MetaTrainConfig
from l2l.meta.pool import load_pool
from l2l.meta.trajectory import momentum_step, zero_velocity
from l2l.params import Blocks, PerturbedParameters

M, N, RANK, BATCHES = 12, 10, 2, 8


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q


SPAN = orthonormal(N, RANK, 1)


OUTPUTS = orthonormal(M, RANK + BATCHES, 2)


SIGNAL = OUTPUTS[:, :RANK] @ torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)) @ SPAN.T


def noise(batch: int) -> Tensor:
    """Twenty times the signal, on an output direction of the batch's own: orthogonal to all others, so exactly noise."""
    along = orthonormal(N, 1, 100 + batch % BATCHES)
    return 20 * OUTPUTS[:, [RANK + batch % BATCHES]] @ along.T


class Slope(nn.Module):
    """A linear loss of a matrix, whose gradient is the same everywhere, and of a vector."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.matrix = nn.Parameter(torch.randn(M, N, generator=draw, dtype=torch.float64))
        self.vector = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, batch: int) -> Tensor:
        return torch.sum(self.matrix * (SIGNAL + noise(batch))) + self.vector.sum()


def same_span(found: Tensor, wanted: Tensor) -> bool:
    """All principal angles are 0."""
    cosines = torch.linalg.svdvals(found.double().T @ wanted)
    return bool(torch.allclose(cosines, torch.ones_like(cosines), atol=1e-6))


def is_orthonormal(found: Tensor) -> bool:
    return bool(torch.allclose(found.T @ found, torch.eye(found.shape[1]), atol=1e-6))


def losses_of(model: nn.Module) -> Losses:
    return Losses("slope", lambda batch: partial(model, batch), BATCHES)


def test_the_gradients_subspace_is_found_and_noise_of_single_batches_is_not_in_it():
    model = Slope()
    before = weights_of(model)
    found = gradient_basis(PerturbedParameters(Blocks.of(model)), [losses_of(model)], RANK)
    assert list(found) == ["matrix"]
    assert found["matrix"].dtype == torch.float32 and is_orthonormal(found["matrix"])
    assert same_span(found["matrix"], SPAN)
    mean = SIGNAL + sum(noise(batch) for batch in range(BATCHES)) / BATCHES
    assert not same_span(leading(mean.T @ mean, RANK), SPAN)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_the_gram_of_the_mean_gradient_is_exact_in_units_of_its_trace_or_of_chance():
    model, expected = Slope(), SIGNAL.T @ SIGNAL
    quiet = [lambda: 3 * torch.sum(model.matrix * SIGNAL)] * 2
    noisy = [partial(model, i) for i in range(BATCHES)]
    chance = (expected.trace().item() + 20**2) / BATCHES
    for closures, unit in ((quiet, expected.trace().item()), (noisy, chance)):
        (gram,) = mean_gradient_grams(Blocks.of(model), closures, [0]).values()
        torch.testing.assert_close(gram, expected / unit, rtol=0, atol=1e-9)


def test_a_task_of_which_only_chance_is_seen_has_no_large_vote():
    model = Slope()
    sides = [lambda sign=sign: sign * torch.sum(model.matrix * noise(0)) for sign in (1.0, -1.0)]
    (gram,) = mean_gradient_grams(Blocks.of(model), sides, [0]).values()
    assert gram.trace().item() == pytest.approx(-2)
    nothing = [lambda: 0 * model.matrix.sum()] * 2
    assert mean_gradient_grams(Blocks.of(model), nothing, [0]) == {}


class Bend(nn.Module):
    """Its gradient lies along the first direction at 0, and along both once the first has been followed."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(M, N, dtype=torch.float64))

    def forward(self, batch: int) -> Tensor:
        first, second = (OUTPUTS[:, 0] @ self.matrix @ SPAN).unbind()
        return first + first**2 * second


def test_gradients_are_looked_at_further_on_too():
    model = Bend()
    theta, way = PerturbedParameters(Blocks.of(model)), MetaTrainConfig(inner_lr=0.2)
    both = gradient_basis(theta, [losses_of(model)], RANK, (0, 4), way)
    assert same_span(both["matrix"], SPAN)
    assert not model.matrix.any()
    start = gradient_basis(theta, [losses_of(model)], RANK, (0,), way)
    assert not same_span(start["matrix"], SPAN)
    assert same_span(start["matrix"][:, :1], SPAN[:, :1])


def test_the_weights_are_back_after_an_error_on_the_way():
    model = Slope()
    before = weights_of(model)

    def at(batch: int) -> Callable[[], Tensor]:
        return lambda: model(batch) * (float("nan") if batch > BATCHES + 5 else 1.0)

    with pytest.raises(FloatingPointError, match=r"task 'slope', gradients for the basis: the loss is nan.* lower inner_lr"):
        gradient_basis(PerturbedParameters(Blocks.of(model)), [Losses("slope", at)], RANK)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("points", [(), (-1, 3)])
def test_points_that_are_none_are_refused(points: tuple[int, ...]):
    with pytest.raises(ValueError, match="must name numbers of steps"):
        gradient_basis(PerturbedParameters(Blocks.of(Slope())), [], RANK, points)


def test_the_span_of_a_layers_inputs_is_found_without_padding_and_what_others_drop():
    layer = nn.Linear(N, 3, dtype=torch.float64)
    draw = torch.Generator().manual_seed(4)
    inside = torch.randn(4, 5, RANK, generator=draw, dtype=torch.float64) @ SPAN.T
    tokens = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    padded = torch.where(tokens[..., None], inside, torch.full_like(inside, 50.0))

    def gathered() -> None:
        handle = layer.register_forward_pre_hook(lambda _, args: (args[0][tokens][None],))
        layer(padded)
        handle.remove()

    blocks = Blocks.of(layer)
    owned = linear_layers(layer, blocks, candidates(blocks, RANK))
    for feed in (
        (lambda: layer(padded), tokens),
        (gathered, tokens),
        (lambda: layer(input=inside), None),
    ):
        found = activation_basis(blocks, owned, [[feed]], RANK)
        assert list(found) == ["weight"]
        assert is_orthonormal(found["weight"]) and same_span(found["weight"], SPAN)
    everything = activation_basis(blocks, owned, [[(lambda: layer(padded), None)]], RANK)
    assert not same_span(everything["weight"], SPAN)
    assert not layer._forward_hooks


def test_only_wide_matrices_that_are_no_embeddings_have_a_basis():
    model = TiedLM()
    blocks = Blocks.of(model)
    assert [blocks[i].name for i in candidates(blocks, 3)] == ["attention.qkv.weight", "attention.out.weight"]
    with pytest.raises(ValueError, match=r"basis_rank=4: no weight matrix.* has more than 8 columns"):
        candidates(blocks, 4)


def test_layers_fed_along_their_rows_have_no_basis_of_activations():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleList([nn.Linear(6, 9), Conv1D(9, 6)])
    blocks = Blocks.of(model)
    indices = candidates(blocks, 2)
    assert [blocks[i].name for i in indices] == ["0.weight", "1.weight"]
    assert linear_layers(model, blocks, indices) == [(indices[0], model[0])]
    with pytest.raises(ValueError, match=r"no weight matrix belongs to an nn.Linear: use 'gradients'"):
        linear_layers(model[1], Blocks.of(model[1]), [0])


@pytest.mark.parametrize("source", ["gradients", "activations", "random"])
def test_every_source_gives_orthonormal_columns_and_leaves_the_model_as_it_was(source, tiny):
    model, pool = tiny
    before, drawn = copy.deepcopy(weights(model)), torch.random.get_rng_state()
    found = pool_basis(model, pool, source, 4, batches=2, points=(0, 1))
    assert same_bits(weights(model), before)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    blocks = Blocks.of(model)
    assert list(found) == [blocks[i].name for i in candidates(blocks, 4)]
    assert all(is_orthonormal(vectors) and vectors.shape[1] == 4 for vectors in found.values())
    again = pool_basis(model, pool, source, 4, batches=2, points=(0, 1))
    assert all(torch.equal(vectors, again[name]) for name, vectors in found.items())


def shares(model: nn.Module, task: Losses, bases: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Per basis, the share of the mean gradient's squared norm inside, over the blocks that have one.

    Both norms are without the noise of single batches: |S|^2 - sum |g_i|^2 over k batches with the sum S.
    """
    blocks = Blocks.of(model)
    found = {}
    for label, basis in bases.items():
        total, inside = 0.0, 0.0
        sums = {i: torch.zeros_like(b.tensor.detach()) for i, b in enumerate(blocks) if b.name in basis}

        def take(index: int, gradient: Tensor, basis=basis, sums=sums) -> None:
            nonlocal total, inside
            if index in sums:
                sums[index] += gradient
                total -= gradient.square().sum().item()
                inside -= (gradient @ basis[blocks[index].name]).square().sum().item()

        for number in range(task.measured):
            consume_gradients(task.at(number), blocks, take)
        total += sum(value.square().sum().item() for value in sums.values())
        inside += sum((value @ basis[blocks[i].name]).square().sum().item() for i, value in sums.items())
        found[label] = inside / total
    return found


@pytest.mark.slow
def test_bases_found_on_the_pool_hold_more_than_chance_of_another_tasks_gradient():
    """At weights to which first-order steps on that task have led."""
    model = l2l.load_model("l2l/tiny")
    config = MetaTrainConfig(batch_size=8, train_size=64, dev_size=4)
    names = ["world_topic", "world_job", "world_season"]
    *pool, other = load_pool(names, config, model, l2l.load_tokenizer("l2l/tiny"), 128)
    bases = {source: pool_basis(model, pool, source, 8, batches=4) for source in ("gradients", "activations", "random")}
    task = Losses("other", lambda number: other.loss(model, other.batcher.at(number)), 4)
    theta = PerturbedParameters(Blocks.of(model))
    velocity = zero_velocity(theta.blocks)
    for number in range(4):
        momentum_step(task.at(task.measured + number), theta, velocity, 1e-2)
    found = shares(model, task, bases)
    assert found["random"] < 0.15
    assert min(found["gradients"], found["activations"]) > 2 * found["random"]
