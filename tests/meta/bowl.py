"""A quadratic whose gradient and Hessian are known, seen through batches that tilt it: for exact tests of objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from l2l.meta.state import MetaLoss, MetaState, SampledLoss
from l2l.methods.learned import Learned
from l2l.noise import Key
from l2l.params import Blocks, PerturbedParameters
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics

SIZES = (6 * 5, 4)
TINY: dict[str, Any] = {
    "tasks": ["world_topic", "world_job"],
    "validation_tasks": [],
    "steps": 5,
    "lr": 1e-4,
    "outer_lr": 0.01,
    "batch_size": 2,
    "train_size": 8,
    "dev_size": 4,
    "restart_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "progress": False,
}
"""Options of a meta-training run as small as can be."""


class Bowl(nn.Module):
    """0.5 x^T H x + tilt_i^T x over a matrix [6, 5] and a vector [4], in float64; H couples all coordinates."""

    hessian: Tensor
    tilts: Tensor

    def __init__(self, tilt: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        size = sum(SIZES)
        self.matrix = nn.Parameter(torch.randn(6, 5, generator=draw, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(4, generator=draw, dtype=torch.float64))
        root = torch.randn(size, size, generator=draw, dtype=torch.float64)
        self.register_buffer("hessian", root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64))
        self.register_buffer("tilts", tilt * torch.randn(8, size, generator=draw, dtype=torch.float64))

    def flat(self) -> Tensor:
        return torch.cat([self.matrix.reshape(-1), self.vector])

    def forward(self, batch: int) -> Tensor:
        x = self.flat()
        return 0.5 * x @ self.hessian @ x + self.tilts[batch] @ x

    def gradient(self, batch: int) -> tuple[Tensor, ...]:
        """Per block."""
        found = self.hessian @ self.flat().detach() + self.tilts[batch]
        return found[:30].view(6, 5), found[30:]

    def hessian_blocks(self) -> tuple[Tensor, Tensor]:
        return self.hessian[:30, :30], self.hessian[30:, 30:]


def basis(rank: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(8)
    return torch.linalg.qr(torch.randn(5, rank, generator=draw, dtype=torch.float64)).Q.float().contiguous()


def tuner_of(model: nn.Module, inside: Tensor | None = None, **options: Any) -> Tuner:
    return Tuner.for_model(model, seed=4, basis=None if inside is None else {"matrix": inside}, **options)


def point_on(model: Bowl, tuner: Tuner, key: Key = Key(5, 7), lr: float = 1e-2, other: int = 1, **changes: Any) -> MetaState:
    """Batch A is number 0, B is ``other``, further ones follow."""
    theta = PerturbedParameters(Blocks.of(model))
    method = Learned(tuner, epsilon=1e-3)
    point = MetaState(
        closure=lambda: model(0),
        other=lambda: model(other),
        further=lambda i: lambda: model(2 + i),
        theta=theta,
        method=method,
        history=RunStatistics.start(theta.blocks),
        key=key,
        lr=lr,
        sampled=lambda i: SampledLoss(lambda: model(2 + i), 7, 3),
    )
    return replace(point, **changes)


def lambdas(outcome: MetaLoss) -> list[float]:
    """(factor * sigma)^2 of both blocks, then inside the basis where there is one."""
    direction = outcome.report.estimates[0].direction
    scales = [*direction.sigma, *direction.basis_sigma[:1]]
    return [(direction.factor * scale) ** 2 for scale in scales]


def slopes(outcome: MetaLoss) -> Tensor:
    """The derivatives in sigma of both blocks, then in that inside the basis where there is one."""
    assert outcome.sigma_gradient is not None
    inside = [] if outcome.basis_gradient is None else [outcome.basis_gradient[:1]]
    return torch.cat([outcome.sigma_gradient, *inside]).double()


def chain(outcome: MetaLoss, slope: Tensor) -> Tensor:
    """Derivatives in lambda as derivatives in sigma."""
    direction = outcome.report.estimates[0].direction
    scales = torch.tensor([*direction.sigma, *direction.basis_sigma[:1]], dtype=torch.float64)
    return 2 * direction.factor**2 * scales * slope


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def inner(model: Bowl, inside: Tensor | None, first: int, second: int) -> Tensor:
    """<gradient, gradient> of two batches under every component."""
    (a, c), (b, d) = model.gradient(first), model.gradient(second)
    found = [torch.sum(a * b), torch.sum(c * d)]
    if inside is not None:
        v = inside.double()
        found.append(5 / v.shape[1] * torch.sum((a @ v) * (b @ v)))
    return torch.stack(found)


def exact_traces(model: Bowl, inside: Tensor | None) -> Tensor:
    first, second = model.hessian_blocks()
    found = [torch.trace(first), torch.trace(second)]
    if inside is not None:
        v = inside.double()
        projector = torch.kron(torch.eye(6, dtype=torch.float64), v @ v.T) * 5 / v.shape[1]
        found.append(torch.trace(projector @ first))
    return torch.stack(found)


def close(model: Bowl, before: list[Tensor]) -> bool:
    return all(torch.allclose(p, kept, rtol=1e-12, atol=1e-12) for p, kept in zip(model.parameters(), before, strict=True))


def meta_gradient(outcome: MetaLoss, network: torch.nn.Module) -> Tensor:
    found = torch.autograd.grad(outcome.surrogate, list(network.parameters()), allow_unused=False)
    return torch.cat([value.reshape(-1) for value in found]).double()
