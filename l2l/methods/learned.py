"""The learned method: MeZO whose perturbation scale per block a tuner sets, at every step.

ZO Fine-tuner, arXiv:2510.00419. u_b = factor * sigma_b * z_b in both perturbation and update; where the tuner has a basis
V_b [n, r], factor * (sigma_b * z_b + basis_sigma_b * sqrt(n / r) * R_b V_b^T); where it has a block schedule, sigma is 0 in
the blocks that do not move at this step. Differs from the paper in taking features, normalizer and all constants from the
tuner's own saved fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch

from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Distribution, Estimates, Key, PerturbedParameters, StepContext
from l2l.tuners import CONSTANT_COLUMNS, RunStatistics, Tuner

STATISTICS_BYTES = 4 + 2 * 8 + 4 * len(CONSTANT_COLUMNS)
"""Of a block: sigma, moments, constants."""


@final
@dataclass(frozen=True)
class Learned(base.Method[RunStatistics]):
    """MeZO with sigma from a tuner, given the statistics of the run so far."""

    info: ClassVar = base.MethodInfo("ZO Fine-tuner, arXiv:2510.00419", "the tuner, and some 50 bytes per block")
    epsilon: float = field(default=1e-3, kw_only=True)
    num_directions: int = field(default=1, kw_only=True)
    distribution: Distribution = field(default="gaussian", kw_only=True)
    tuner: Tuner
    horizon: int | None = None
    """Steps of the run, for tuners with the fraction of the run as a feature; None: unknown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_counts(horizon=1 if self.horizon is None else self.horizon)

    def state_bytes(self, blocks: Blocks) -> int:
        held = [*self.tuner.network.parameters(), *(self.tuner.basis or {}).values()]
        basis = self.tuner.basis_for(blocks)  # cast and on the blocks' device
        bound = () if basis is None else basis.vectors.values()
        return STATISTICS_BYTES * len(blocks) + sum(tensor.nbytes for tensor in (*held, *bound))

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
        self, theta: PerturbedParameters, state: RunStatistics, estimates: Estimates, context: StepContext
    ) -> RunStatistics:
        base.descend(theta, estimates, context.lr)
        return self.statistics_after(theta, state, estimates, context, estimates[-1].direction.sigma)

    def statistics_after(
        self,
        theta: PerturbedParameters,
        state: RunStatistics,
        estimates: Estimates,
        context: StepContext,
        sigma: Sequence[float],
    ) -> RunStatistics:
        """The statistics with one more step, after its update; ``sigma`` is the tuner's."""
        losses = [(estimate.losses[0], estimate.losses[-1]) for estimate in estimates]
        gradients = [estimate.projected_gradient for estimate in estimates]
        moments = theta.moments(estimates[-1].direction)
        return state.after(sigma, moments, losses, gradients, context.curvature, self.horizon)
