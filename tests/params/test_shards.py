"""Sharded weights: each process moves its part by the noise of the whole, and the run is that of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TiedLM
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional

import l2l
from l2l.methods.registry import build_method
from l2l.noise import Key
from l2l.optim import ZOOptimizer
from l2l.params import Blocks, Direction, PerturbedParameters
from l2l.params.engine import block_moments

pytestmark = pytest.mark.in_turn

STEPS = 3


class MLP(nn.Module):
    """Rows that two and four processes cannot share evenly, and a matrix whose halves are whole chunks of sums."""

    x: Tensor
    y: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Linear(256, 257)
            self.second = nn.Linear(257, 512)
            self.third = nn.Linear(512, 256)
            self.last = nn.Linear(256, 3)
        self.register_buffer("x", torch.randn(6, 256, generator=draw))
        self.register_buffer("y", torch.randint(3, (6,), generator=draw))

    def forward(self) -> Tensor:
        hidden = functional.gelu(self.third(functional.gelu(self.second(functional.gelu(self.first(self.x))))))
        return functional.cross_entropy(self.last(hidden), self.y)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "tied": TiedLM}


def fully_sharded(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model.children() if not isinstance(model, TiedLM) else ():
        fully_shard(child, **options)
    return fully_shard(model, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {b.name: getattr(b.tensor.detach(), "full_tensor", b.tensor.detach)() for b in Blocks.of(model)}


def optimizer_of(kind: str, model: nn.Module) -> Any:
    if kind == "learned":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            tuner = l2l.Tuner.for_model(model, "shared_mlp")
            for parameter in tuner.network.parameters():
                nn.init.normal_(parameter, std=0.3)  # a fresh tuner says 1 for every block
        return l2l.ZOFineTuner(model, tuner, lr=1e-3, seed=4)
    if kind == "fzoo":
        return l2l.FZOO(model, lr=1e-3, seed=4)
    return l2l.MeZO(model, lr=1e-2, seed=4, weight_decay=0.1, on_bad_loss="clip")


def run(model: nn.Module, kind: str, fused: bool = False, steps: int = STEPS) -> dict[str, Any]:
    optimizer = optimizer_of(kind, model)
    losses: list[float] = []
    sigma: list[tuple[float, ...]] = []

    def loop() -> None:
        for _ in range(steps):
            losses.append(optimizer.step(model))
            assert optimizer.report is not None
            sigma.append(optimizer.report.estimates[0].direction.sigma)

    if fused:
        with optimizer.theta.fused_steps():
            loop()
    else:
        loop()
    with torch.no_grad():
        seen = model().item()
    losses.append(optimizer.step(model))  # after a pass that has gathered the weights
    moments = getattr(optimizer.method_state, "moments", None)
    return {"losses": losses, "seen": seen, "sigma": sigma, "weights": whole(model), "moments": moments}


Case = tuple[str, str, bool]


def sharded_runs(cases: list[Case]) -> list[dict[str, Any]]:
    return [run(fully_sharded(MODELS[model]()), kind, fused) for model, kind, fused in cases]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    assert found["seen"] == expected["seen"]
    assert found["sigma"] == expected["sigma"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(found["weights"][name], own) for name, own in expected["weights"].items())
    assert found["moments"] is None or torch.equal(found["moments"], expected["moments"])


def compare(ranks: int, cases: list[Case]) -> None:
    found = on_ranks(ranks, sharded_runs, cases)
    for i, (model, kind, fused) in enumerate(cases):
        expected = run(MODELS[model](), kind, fused)
        for of_rank in found:
            assert_same(of_rank[i], expected)
    assert cases


def test_a_run_of_two_processes_is_that_of_one():
    """fully_shard; with a tuner, whose features are sums over blocks, and with losses that all directions share."""
    compare(2, [("mlp", "learned", True), ("tied", "mezo", False), ("mlp", "fzoo", False)])


ALL = [(model, kind, fused) for model in MODELS for kind in ("mezo", "fzoo", "learned") for fused in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_run_of_several_processes_is_that_of_one(ranks: int):
    compare(ranks, ALL)


PLACES = [(), (1,), (3,), (7, 5), (5, 8), (4, 3, 6), (2, 3, 4, 2), (600, 128), (1024, 128)]


def meshes(count: int) -> list[tuple[tuple[int, ...], list[tuple[Any, ...]]]]:
    """Shapes of a mesh, and placements on it."""
    from torch.distributed.tensor import Replicate, Shard

    flat: list[tuple[Any, ...]] = [(Shard(0),), (Shard(1),), (Shard(2),), (Replicate(),)]
    square = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(0))]
    return [((count,), flat), *([((2, count // 2), square)] if count > 2 else [])]


def moved_shards() -> int:
    """Move shards of many forms along a direction, and measure them; how many were as those of the whole."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    seen = 0
    for shape, placements in meshes(dist.get_world_size()):
        mesh = init_device_mesh("cpu", shape)
        for placed in placements:
            for size in PLACES:
                if any(p.is_shard() and p.dim >= len(size) for p in placed):
                    continue
                values = torch.randn(size, generator=torch.Generator().manual_seed(1))
                model, plain = nn.Module(), nn.Module()
                plain.weight = nn.Parameter(values.clone())
                model.weight = nn.Parameter(distribute_tensor(values.clone(), mesh, placed))
                direction = Direction(Key(2, 5), (0.7,), centre=(0.1,))
                states = []
                for one in (plain, model):
                    theta = PerturbedParameters(Blocks.of(one))
                    with theta.step():
                        theta.perturb(direction, 1e-3)
                        theta.perturb(direction, -1e-3)
                        theta.add(direction, [0.3])
                        closed_form = theta.moments(direction)
                    weight = one.weight.detach()
                    weight = weight.full_tensor() if one is model else weight
                    states.append((weight, closed_form, theta.moments(direction), block_moments(theta.blocks)))
                assert torch.equal(states[0][0], states[1][0]), (shape, placed, size)
                assert repr(states[0][1:]) == repr(states[1][1:]), (shape, placed, size)
                seen += 1
    return seen


def test_shards_of_any_form_move_as_the_whole_does():
    assert on_ranks(2, moved_shards) == [25, 25]


@pytest.mark.slow
def test_shards_on_a_mesh_of_two_dimensions_move_as_the_whole_does():
    assert on_ranks(4, moved_shards)[0] > 40


def refused() -> dict[str, str]:
    """What is said of sharded models that cannot be trained so; and every way out is taken."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy

    said: dict[str, str] = {}

    def refuse(name: str, error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            call()
        said[name] = str(caught.value)

    refuse("half", ValueError, lambda: l2l.MeZO(fully_sharded(TiedLM().bfloat16())))
    refuse("functional", ValueError, lambda: l2l.MeZO(fully_sharded(TiedLM()), perturb="functional"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_sharded(TiedLM(), mp_policy=policy)
    l2l.MeZO(model, perturb="in_place", sparse_embeddings=False).step(model)
    model = fully_sharded(TiedLM())
    before = whole(model)
    for name in ("dizo", "adam"):  # at once
        refuse(name, ValueError, lambda name=name: ZOOptimizer(model, build_method(name, 1e-3, {}, None, model)))
    for name in ("lozo", "sign"):
        optimizer = ZOOptimizer(model, build_method(name, 1e-3, {}, None, model), 1e-3)
        refuse(name, ValueError, lambda optimizer=optimizer: optimizer.step(model))
    for block, own in whole(model).items():  # within one rounding per traversal
        assert torch.allclose(before[block], own, rtol=0, atol=1e-6)
    optimizer = l2l.MeZO(model)
    shift = float(dist.get_rank())
    refuse("losses", RuntimeError, lambda: optimizer.step(lambda: model() + shift))
    for block, own in whole(model).items():  # within one rounding per traversal
        assert torch.allclose(before[block], own, rtol=0, atol=1e-6)

    def mean() -> Tensor:
        loss = model() + shift
        dist.all_reduce(loss)
        return loss / dist.get_world_size()

    optimizer.step(mean)
    saved = l2l.MeZO(model, on_bad_loss="rollback:1")
    kept = whole(model)
    saved.step(model)
    saved.step(lambda: model() * float("nan"))  # goes back to the weights before the step before
    said["back"] = str(all(torch.equal(kept[name], own) for name, own in whole(model).items()))
    return said


def test_what_shards_cannot_do_is_refused_and_every_way_out_leads_out():
    said = on_ranks(2, refused)[0]
    assert "'embed.weight' is sharded" in said["half"] and "MixedPrecisionPolicy" in said["half"]
    assert said["functional"] == said["half"]
    assert "the state of Adam, of the size of the weights, needs whole blocks" in said["adam"]
    assert "the state of DiZO" in said["dizo"]
    assert "a direction along a basis or an operator needs whole blocks" in said["lozo"]
    assert "a step that is no move along directions needs whole blocks" in said["sign"]
    assert "use a method that moves along noise alone, as mezo, fzoo and learned do" in said["sign"]
    assert "the processes see different losses" in said["losses"] and "all_reduce" in said["losses"]
    assert said["back"] == "True"


def two_dimensions() -> tuple[str, dict[str, Any]]:
    """Two kinds of parallelism that split the same rows are refused; along other dimensions they are trained as one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))

    def parallel(placed: Any) -> nn.Module:
        model = Pair()
        parallelize_module(model, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["data"], shard_placement_fn=placed)

    with pytest.raises(ValueError) as caught:
        l2l.MeZO(parallel(None))
    other = {(16, 8): Shard(1), (8, 16): Shard(0)}
    model = parallel(lambda parameter: other.get(tuple(parameter.shape)))
    return str(caught.value), run(model, "mezo")


class Pair(nn.Module):
    """An MLP of two matrices, the first split by columns and the second by rows, as in tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self) -> Tensor:
        x = torch.linspace(-1, 1, 40).view(5, 8)
        return (self.down(functional.gelu(self.up(x))) - 0.3).square().mean()


@pytest.mark.slow
def test_two_kinds_of_parallelism_go_together_along_different_dimensions():
    said, found = on_ranks(4, two_dimensions)[0]
    assert "set its shard_placement_fn" in said
    expected = run(Pair(), "mezo")
    # the partial products of tensor parallelism are added in another order
    assert found["losses"] == pytest.approx(expected["losses"], rel=0, abs=1e-6)
    assert all(torch.allclose(found["weights"][name], own, rtol=0, atol=1e-6) for name, own in expected["weights"].items())
