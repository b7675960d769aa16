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
from l2l.noise import Key, TensorSlice, standard_noise
from l2l.params import Blocks, Direction, PerturbedParameters
from l2l.params.engine import block_moments
from l2l.params.shards import shard_slices

STEPS = 4


class MLP(nn.Module):
    """Rows that two and four processes cannot share evenly, a matrix whose halves are whole chunks of noise sums, and scalars."""

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


def sharded_run(model: str, kind: str, fused: bool, steps: int) -> dict[str, Any]:
    return run(fully_sharded(MODELS[model]()), kind, fused, steps)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    assert found["seen"] == expected["seen"]
    assert found["sigma"] == expected["sigma"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(found["weights"][name], own) for name, own in expected["weights"].items())
    assert found["moments"] is None or torch.equal(found["moments"], expected["moments"])
