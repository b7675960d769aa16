"""The learned method: MeZO whose perturbation scale per block a tuner sets, at every step.

ZO Fine-tuner, arXiv:2510.00419. u_b = factor * sigma_b * z_b in both perturbation and update; where the tuner has a basis
V_b [n, r], factor * (sigma_b * z_b + basis_sigma_b * sqrt(n / r) * R_b V_b^T); where it takes turns, sigma is 0 in all
blocks but those whose turn it is. Differs from it in taking features, normaliser and all constants from the tuner's own
saved fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, check_counts, check_positive, descend
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics

HISTORY_BYTES = 4 + 2 * 8 + 8 * 4 + 8
"""Of a block: sigma, moments, constants, the first variance."""


@final
@dataclass(frozen=True)
class Learned(Method[RunStatistics]):
    """Sigma from a tuner, by what the run has shown so far. Extra memory: some sixty bytes per block, and the basis."""

    info: ClassVar = MethodInfo("ZO Fine-tuner, arXiv:2510.00419", "some 60 bytes per block, and the basis")
    tuner: Tuner
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    horizon: int | None = None
    """Steps that the run is to take, for tuners that look at the share that lies behind; None: unknown."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions, horizon=1 if self.horizon is None else self.horizon)

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        basis = self.tuner.basis_for(blocks)
        vectors = () if basis is None else basis.vectors.values()
        return HISTORY_BYTES * len(blocks) + sum(v.numel() * v.element_size() for v in vectors)

    def init(self, blocks: Blocks) -> RunStatistics:
        self.tuner.rows(blocks.names)
        return RunStatistics.start(blocks, self.horizon or 0)

    def direction(self, blocks: Blocks, state: RunStatistics, key: Key) -> Direction:
        tuner = self.tuner
        with torch.no_grad():
            scales = tuner.scales(tuner.features(state), blocks.names)
        if tuner.block_schedule is not None:
            moving = tuner.block_schedule.moving(key, blocks.names)
            mask = torch.tensor([float(name in moving) for name in blocks.names])
            scales = scales * mask.reshape(-1, *[1] * (scales.ndim - 1))
        factor, basis = tuner.factor(scales, blocks), tuner.basis_for(blocks)
        dense, *inside = (tuple(column) for column in scales.reshape(len(scales), -1).t().tolist())
        if basis is None:
            return Direction(key, dense, self.distribution, factor, state.centre)
        return Direction(key, dense, self.distribution, factor, state.centre, basis, inside[0])

    def update_(
        self, theta: PerturbedParameters, state: RunStatistics, estimates: Sequence[Estimate], context: StepContext
    ) -> RunStatistics:
        descend(theta, estimates, context.lr)
        last = estimates[-1].direction
        return state.after(
            last.sigma,
            theta.moments(last),
            losses=[(estimate.losses[0], estimate.losses[-1]) for estimate in estimates],
            gradients=[estimate.projected_gradient for estimate in estimates],
            curvature=context.curvature,
            horizon=self.horizon,
        )
