"""Groups looked at one by one: by structure, with the others at home, and added up rather than averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from torch import Tensor, nn
from torch.func import functional_call

from l2l.methods.base import Method
from l2l.methods.conservative import Conservative
from l2l.methods.hizoo import HiZOO
from l2l.methods.lozo import LOZO
from l2l.methods.mezo import MeZO
from l2l.methods.sign import Sign
from l2l.methods.svrg import SVRG
from l2l.methods.wrappers.blockwise import Blockwise
from l2l.methods.wrappers.hybrid import Hybrid
from l2l.methods.wrappers.learned import LearnedWrapper
from l2l.methods.wrappers.sparse import Sparse
from l2l.noise import Key, standard_noise
from l2l.optim import ZOOptimizer
from l2l.params import Blocks
from l2l.params.operators import layers
from l2l.tuners.api import Tuner

pytestmark = pytest.mark.in_turn

LR, EPSILON, SEED = 0.01, 1e-3, 4


class Deep(nn.Module):
    """An embedding, numbered layers of two tensors each, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(9, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

    def forward(self) -> Tensor:
        x = self.embed(torch.arange(9))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x)).logsumexp(-1).mean() - self.head.bias.sum()


def names_of(method: Blockwise, model: nn.Module) -> list[list[str]]:
    blocks = Blocks.of(model)
    return [[blocks.names[i] for i in sorted(part)] for part in method.parts(blocks)]


def test_layers_are_the_members_of_the_outermost_numbered_container():
    blocks = Blocks.of(Deep())
    inside, outside = layers(blocks)
    assert [[blocks.names[i] for i in layer] for layer in inside] == [
        [f"layers.{k}.weight", f"layers.{k}.bias"] for k in range(4)
    ]
    assert [blocks.names[i] for i in outside] == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    ]


def test_without_numbers_each_module_that_owns_blocks_is_a_layer():
    inside, outside = layers(Blocks.of(TiedLM()))
    assert [len(layer) for layer in inside] == [1, 2, 1, 2]
    assert outside == []
    assert layers(Blocks.of(Quadratic())) == ([[0, 1]], [])


def test_groups_are_neighbours_that_are_never_divided():
    model = Deep()
    assert [len(part) for part in names_of(Blockwise(MeZO(), groups=5), model)] == [2, 2, 2, 2, 5]
    assert [len(part) for part in names_of(Blockwise(MeZO(), groups=2), model)] == [6, 7]
    assert [len(part) for part in names_of(Blockwise(MeZO(), groups=99), model)] == [2, 2, 2, 2, 5]
    assert [len(part) for part in names_of(Blockwise(MeZO(), level="block", groups=99), model)] == [1] * 13
    assert [len(part) for part in names_of(Blockwise(MeZO(), level="all"), model)] == [13]
    by_name = names_of(Blockwise(MeZO(), patterns=(r"^layers\.[01]", "bias", "")), model)
    assert by_name[0] == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert by_name[1] == ["layers.2.bias", "layers.3.bias", "norm.bias", "head.bias"]


@pytest.mark.parametrize("apply", ["after", "at once"])
@pytest.mark.parametrize("num_directions", [1, 2])
def test_twenty_steps_are_those_of_a_dense_loop_over_groups(apply: Any, num_directions: int):
    model, twin = Deep().double(), Deep().double()
    method = Blockwise(MeZO(EPSILON, num_directions), groups=3, apply=apply)
    optimizer = ZOOptimizer(model, method, LR, SEED)
    at, groups = weights(twin), names_of(method, twin)

    def loss(at: dict[str, Tensor]) -> float:
        return functional_call(twin, at, ()).item()

    for step in range(20):
        optimizer.step(model)
        following = at
        for group in groups:
            base = following if apply == "at once" else at
            change = {n: torch.zeros_like(at[n]) for n in group}
            for draw in range(num_directions):
                key = Key(SEED, step, draw)
                z = {n: standard_noise(n, key, at[n].shape, dtype=torch.float64) for n in group}
                plus, minus = (loss(base | {n: base[n] + by * z[n] for n in group}) for by in (EPSILON, -EPSILON))
                change = {n: change[n] + (plus - minus) / (2 * EPSILON) / num_directions * z[n] for n in group}
            following = following | {n: following[n] - LR * change[n] for n in group}
        at = following
    for name, value in weights(model).items():
        torch.testing.assert_close(value, at[name], rtol=0, atol=1e-6)
    assert optimizer.report is not None
    assert optimizer.report.passes == method.passes == 2 * 3 * num_directions


@pytest.mark.parametrize("inner", [MeZO(), MeZO(num_directions=2), LOZO(interval=3), HiZOO(smooth=0.01)])
def test_one_group_is_the_method_inside_bit_for_bit(inner: Method[Any]):
    model, other = Deep(), Deep()
    for m, method in ((model, Blockwise(inner, level="all")), (other, inner)):
        optimizer = ZOOptimizer(m, method, LR)
        for _ in range(8):
            optimizer.step(m)
        assert optimizer.report is not None and optimizer.report.passes == method.passes
    assert same_bits(weights(model), weights(other))


@pytest.mark.parametrize(
    "inner",
    [Conservative(), Conservative(num_directions=2), Sparse(Conservative()), Hybrid(Conservative()), SVRG(interval=2)],
    ids=lambda inner: type(inner).__name__,
)
def test_passes_that_do_not_follow_the_looks_are_declared_once(inner: Method[Any]):
    model, method = Deep(), Blockwise(inner, groups=3)
    optimizer, spent = ZOOptimizer(model, method, LR), 0.0
    for _ in range(4):
        optimizer.step(model)
        assert optimizer.report is not None
        spent += optimizer.report.passes
    assert spent / 4 == method.passes


def test_the_step_is_right_on_average_and_not_divided_by_the_number_of_groups():
    """On a linear loss E[g z] is the gradient, group by group."""
    model = Deep().double()
    slope = {name: torch.full_like(value, 0.5) for name, value in weights(model).items()}
    start = weights(model)
    optimizer = ZOOptimizer(model, Blockwise(MeZO(num_directions=400), groups=5), lr=1.0)
    optimizer.step(lambda: sum((slope[n] * p).sum() for n, p in model.named_parameters()))
    moved = torch.cat([(weights(model)[n] - start[n]).flatten() for n in start])
    assert moved.mean().item() == pytest.approx(-0.5, abs=0.03)


def test_a_sign_is_taken_of_each_group_and_not_averaged_down():
    model = Deep().double()
    start = weights(model)
    optimizer = ZOOptimizer(model, Blockwise(Sign(reading="scalar"), groups=5), lr=0.01)
    optimizer.step(model)
    for name, value in weights(model).items():
        z = standard_noise(name, Key(0), value.shape, dtype=torch.float64)
        torch.testing.assert_close((value - start[name]).abs(), 0.01 * z.abs(), rtol=1e-9, atol=1e-12)


def test_equal_groups_have_noise_of_their_own():
    model = Deep().double()
    start, looked = weights(model), []
    ZOOptimizer(model, Blockwise(MeZO(), groups=5)).step(lambda: (looked.append(weights(model)), model())[1])
    first = looked[0]["layers.0.weight"] - start["layers.0.weight"]
    second = looked[2]["layers.1.weight"] - start["layers.1.weight"]
    assert first.abs().max() > 0 and second.abs().max() > 0
    assert not torch.allclose(first, second)
    for group, look in enumerate(looked[:8:2]):  # the others at home, within a rounding
        moved = [n for n in start if (look[n] - start[n]).abs().max() > 1e-9]
        assert moved == [f"layers.{group}.weight", f"layers.{group}.bias"]


def test_every_block_moves_embeddings_and_head_among_them():
    model = Deep()
    start = weights(model)
    ZOOptimizer(model, Blockwise(MeZO()), LR).step(model)
    assert all(not torch.equal(start[name], value) for name, value in weights(model).items())


def test_it_goes_under_a_tuner_and_around_one():
    tuner = Tuner.for_model(Deep(), seed=5)
    for method in (LearnedWrapper(Blockwise(MeZO(), apply="at once"), tuner), Blockwise(LearnedWrapper(LOZO(), tuner))):
        model = Deep()
        before = model().item()
        optimizer = ZOOptimizer(model, method, lr=0.003)
        for _ in range(60):
            optimizer.step(model)
        assert model().item() < before


def test_at_once_after_an_error_theta_is_back():
    model = Deep()
    optimizer = ZOOptimizer(model, Blockwise(MeZO(), groups=4, apply="at once"), lr=0.1)
    before, calls = weights(model), []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("in the third group")
        return model()

    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    assert max((weights(model)[n] - v).abs().max().item() for n, v in before.items()) < 1e-6


def blockwise(**args: Any) -> Blockwise:
    return Blockwise(MeZO(), **args)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blockwise(level="head"), "level='head' must be one of block, layer, all"),
        (lambda: blockwise(apply="soon"), "apply='soon' must be one of after, at once"),
        (lambda: Blockwise(MeZO(), groups=0), "groups=0 must be a whole number"),
        (lambda: Blockwise(MeZO(), patterns=("(",)), r"patterns: '\(' is no regular expression"),
        (lambda: Blockwise(MeZO(), patterns=("embed",)), "none matches block 'layers.0.weight'; a last pattern ''"),
        (lambda: Blockwise(MeZO(), patterns=("", "embed")), "'embed' is left without a block"),
        (
            lambda: Blockwise(HiZOO(), apply="at once"),
            "apply='at once' takes a step of the method inside for every group",
        ),
        (lambda: Blockwise(Sign(), apply="at once"), "which one that leaves its directions could not take back"),
    ],
)
def test_bad_values_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ZOOptimizer(Deep(), make())
