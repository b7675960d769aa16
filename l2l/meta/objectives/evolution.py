"""The loss after a real run, differentiated by trying: no backward pass at all, the memory of inference.

Antithetic evolution strategy (Salimans et al. 2017, arXiv:1703.03864) over the tuner's weights w: for every pair a direction
delta of standard noise, and ghat = mean over pairs of (L(w + s delta) - L(w - s delta)) / (2 s) * delta. Both runs of a pair
and all pairs take the same steps from the same theta with the same noise and batches, so only the tuner differs. It
sees everything that a run depends on: the normaliser, the projected gradients, the features of later steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from l2l.estimators.finite_difference import Closure, finite_loss
from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.trajectory import walked
from l2l.methods.base import check_counts, check_positive
from l2l.noise import Key, standard_noise


@final
@dataclass(frozen=True)
class Evolution(Objective):
    """``population`` pairs of runs of ``steps`` steps: 2 * population * (2 * steps + 1) forward passes, and two more for the
    history. No graph, no gradient, no copy of the model."""

    hands_gradients: ClassVar[bool] = False

    population: int = 4
    """Pairs of tuners tried."""
    scale: float = 0.03
    """How far a weight of the tuner is moved, one standard deviation."""
    steps: int = 4
    """Zeroth-order steps of a run, each on a batch of its own; batch B judges."""

    def __post_init__(self) -> None:
        check_counts(population=self.population, steps=self.steps)
        check_positive(scale=self.scale)

    def __call__(self, point: MetaState) -> MetaLoss:
        network = point.method.tuner.network
        batches = [point.closure, *(point.further(i) for i in range(self.steps - 1))]
        with walked(point, [point.closure]) as steps:
            own = steps[0]
        estimate = [torch.zeros_like(weight.detach()) for weight in network.parameters()]
        ends, passes = [], own.report.passes
        for pair in range(self.population):
            delta = noise_of(network, point.key.with_draw(pair))
            found = [self._end(point, batches, delta, sign) for sign in (1.0, -1.0)]
            slope = (found[0][0] - found[1][0]) / (2 * self.scale * self.population)
            for total, one in zip(estimate, delta, strict=True):
                total.add_(one, alpha=slope)
            ends += [loss for loss, _ in found]
            passes += sum(cost for _, cost in found)
        value = sum(ends) / len(ends)
        parts = [torch.sum(w * g) for w, g in zip(network.parameters(), estimate, strict=True)]
        return MetaLoss(torch.stack(parts).sum(), value, value, own.features, own.following, own.report, passes)

    def _end(self, point: MetaState, batches: list[Closure], delta: list[Tensor], sign: float) -> tuple[float, int]:
        """Loss of batch B after the run with the tuner moved, and the passes it took."""
        with moved(point.method.tuner.network, delta, sign * self.scale), walked(point, batches) as steps:
            return finite_loss(point.other), sum(step.report.passes for step in steps) + 1


def noise_of(network: nn.Module, key: Key) -> list[Tensor]:
    """Standard noise in the shape of each of the network's weights."""
    return [
        standard_noise(f"tuner {name}", key, weight.shape, dtype=weight.dtype, device=weight.device)
        for name, weight in network.named_parameters()
    ]


@contextmanager
def moved(network: nn.Module, delta: list[Tensor], distance: float) -> Iterator[None]:
    """The network's weights at ``+ distance * delta`` inside; afterwards the very bits they had."""
    kept = [weight.detach().clone() for weight in network.parameters()]
    with torch.no_grad():
        try:
            for weight, one in zip(network.parameters(), delta, strict=True):
                weight.add_(one, alpha=distance)
            yield
        finally:
            for weight, value in zip(network.parameters(), kept, strict=True):
                weight.copy_(value)
