"""Where a basis comes from: it holds what gradients and inputs have in common, and finding it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from bowl import Bowl, basis, point_on, tuner_of, weights_of
from cases import TiedLM, same_bits, weights
from torch import Tensor, nn

import l2l
from l2l.meta.bases import (
    Feed,
    Losses,
    activation_basis,
    candidates,
    gradient_basis,
    leading,
    mean_gradient_grams,
    owners,
    pool_basis,
)
from l2l.meta.config import MetaTrainConfig
from l2l.meta.normalizer import FLOOR, floored, model_traces
from l2l.meta.objectives.runs import ESFullRun
from l2l.meta.pool import load_pool
from l2l.meta.trajectory import TrajectoryConfig
from l2l.noise import Key
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tuners.model import random_basis

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
    theta, way = PerturbedParameters(Blocks.of(model)), TrajectoryConfig(lr=0.2)
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

    with pytest.raises(
        FloatingPointError, match=r"task 'slope', gradients for the basis: the loss is nan.* lower inner_lr"
    ):
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
    owned = owners(layer, blocks, candidates(blocks, RANK))
    for feed in (Feed(lambda: layer(padded), tokens), Feed(gathered, tokens), Feed(lambda: layer(input=inside))):
        found = activation_basis(blocks, owned, [[feed]], RANK)
        assert list(found) == ["weight"]
        assert is_orthonormal(found["weight"]) and same_span(found["weight"], SPAN)
    everything = activation_basis(blocks, owned, [[Feed(lambda: layer(padded))]], RANK)
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
    assert owners(model, blocks, indices) == [(indices[0], model[0])]
    with pytest.raises(ValueError, match=r"no weight matrix belongs to an nn.Linear: use 'gradients'"):
        owners(model[1], Blocks.of(model[1]), [0])


CONFIG = MetaTrainConfig(
    tasks=["world_topic", "world_job"], batch_size=4, train_size=16, dev_size=4, trajectory="teacher", progress=False
)


@pytest.fixture(scope="module")
def tiny():
    model = l2l.load_model("l2l/tiny")
    model.eval()
    pool = load_pool(["world_topic", "world_job"], CONFIG, model, l2l.load_tokenizer("l2l/tiny"), 128)
    return model, pool


@pytest.mark.parametrize("source", ["gradients", "activations", "random"])
def test_every_source_gives_orthonormal_columns_and_leaves_the_model_as_it_was(source, tiny):
    model, pool = tiny
    before, drawn = copy.deepcopy(weights(model)), torch.random.get_rng_state()
    found = pool_basis(model, pool, source, 4, batches=2)
    assert same_bits(weights(model), before)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    blocks = Blocks.of(model)
    assert list(found) == [blocks[i].name for i in candidates(blocks, 4)]
    assert all(is_orthonormal(vectors) and vectors.shape[1] == 4 for vectors in found.values())
    again = pool_basis(model, pool, source, 4, batches=2)
    assert all(torch.equal(vectors, again[name]) for name, vectors in found.items())


def test_traces_inside_a_basis_of_all_directions_are_those_of_the_blocks(tiny):
    model, pool = tiny
    blocks = Blocks.of(model)
    whole = random_basis(blocks, {b.name: b.tensor.shape[1] for b in blocks if b.tensor.ndim == 2 and not b.embedding})
    dense, inside = model_traces(model, pool, 0, 1, whole)
    assert list(inside) == list(whole)
    assert inside == pytest.approx({name: dense[name] for name in whole}, rel=1e-4)
    assert model_traces(model, pool, 0, 1) == (pytest.approx(dense), {})


def test_traces_inside_gradients_are_larger_than_in_random_directions(tiny):
    model, pool = tiny
    bases = [pool_basis(model, pool, source, 4, batches=4) for source in ("gradients", "random")]
    learned, control = (model_traces(model, pool, 0, 2, basis)[1] for basis in bases)
    assert sum(learned.values()) > 1.5 * sum(control.values())


def test_a_block_that_the_loss_does_not_reach_has_a_trace_all_the_same():
    found = floored(torch.tensor([0.0, 2.0, 4.0, 0.0]).double(), 3)
    assert found.tolist() == [2 * FLOOR, 2.0, 4.0, 2 * FLOOR]
    assert floored(torch.tensor([float("nan"), 1.0]), 2).isnan().any()


def test_whole_runs_teach_a_tuner_with_a_basis_role_by_role():
    model = Bowl()
    point = point_on(model, tuner_of(model, basis(), architecture="table"))
    before = weights_of(model)
    objective = ESFullRun(population=3, steps=6, tie="role")
    (delta,) = objective._delta(point.method.tuner, Key(1))
    assert delta.shape == (2, 2)
    (slope,) = torch.autograd.grad(objective(point).surrogate, list(point.method.tuner.network.parameters()))
    assert slope[0, 0] != 0 and slope[0, 1] != 0
    assert all(
        torch.allclose(p, kept, rtol=1e-12, atol=1e-12) for p, kept in zip(model.parameters(), before, strict=True)
    )
