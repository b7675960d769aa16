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

from l2l.blocks import Blocks
from l2l.estimators.base import Estimate
from l2l.methods.base import About, Method, StepContext, check_counts, check_positive, descend
from l2l.noise import Distribution, Key
from l2l.perturb import Direction, Theta
from l2l.tuners.features import History
from l2l.tuners.tuner import Tuner

HISTORY_BYTES = 4 + 2 * 8 + 8 * 4 + 8
"""Of a block: sigma, moments, constants, the first variance."""


@final
@dataclass(frozen=True)
class Learned(Method[History]):
    """Sigma from a tuner, by what the run has shown so far. Extra memory: some sixty bytes per block, and the basis."""

    about: ClassVar = About("ZO Fine-tuner, arXiv:2510.00419", "some 60 bytes per block, and the basis")
    tuner: Tuner
    epsilon: float = 1e-3
    draws: int = 1
    distribution: Distribution = "gaussian"
    horizon: int | None = None
    """Steps that the run is to take, for tuners that look at the share that lies behind; None: unknown."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(draws=self.draws, horizon=1 if self.horizon is None else self.horizon)

    @property
    def passes(self) -> float:
        return 2.0 * self.draws

    def kept(self, blocks: Blocks) -> int:
        basis = self.tuner.basis_for(blocks)
        vectors = () if basis is None else basis.vectors.values()
        return HISTORY_BYTES * len(blocks) + sum(v.numel() * v.element_size() for v in vectors)

    def init(self, blocks: Blocks) -> History:
        self.tuner.rows(blocks.names)
        return History.start(blocks, self.horizon or 0)

    def direction(self, blocks: Blocks, state: History, key: Key) -> Direction:
        tuner = self.tuner
        with torch.no_grad():
            scales = tuner.scales(tuner.features(state), blocks.names)
        if tuner.turns is not None:
            moving = tuner.turns.moving(key, blocks.names)
            mask = torch.tensor([float(name in moving) for name in blocks.names])
            scales = scales * mask.reshape(-1, *[1] * (scales.ndim - 1))
        factor, basis = tuner.factor(scales, blocks), tuner.basis_for(blocks)
        dense, *inside = (tuple(column) for column in scales.reshape(len(scales), -1).t().tolist())
        if basis is None:
            return Direction(key, dense, self.distribution, factor, state.centre)
        return Direction(key, dense, self.distribution, factor, state.centre, basis, inside[0])

    def update_(self, theta: Theta, state: History, estimates: Sequence[Estimate], context: StepContext) -> History:
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
