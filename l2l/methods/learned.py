"""The learned method: MeZO whose perturbation scale per block a tuner sets, at every step.

ZO Fine-tuner, arXiv:2510.00419. u_b = factor * sigma_b * z_b in both perturbation and update. Differs from it in
taking features, normaliser and all constants from the tuner's own saved fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from l2l.blocks import Blocks
from l2l.estimators.base import Estimate
from l2l.methods.base import Method, StepContext, check_counts, check_positive, descend
from l2l.noise import Distribution, Key
from l2l.perturb import Direction, Theta
from l2l.tuners.features import History
from l2l.tuners.tuner import Tuner


@final
@dataclass(frozen=True)
class Learned(Method[History]):
    """Sigma from a tuner, by block statistics, last losses and last sigma. Extra memory: five floats per block."""

    tuner: Tuner
    epsilon: float = 1e-3
    draws: int = 1
    distribution: Distribution = "gaussian"

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(draws=self.draws)

    def init(self, blocks: Blocks) -> History:
        self.tuner.rows(blocks.names)
        return History.start(blocks)

    def direction(self, blocks: Blocks, state: History, key: Key) -> Direction:
        with torch.no_grad():
            sigma = self.tuner.sigma(self.tuner.features(state), blocks.names)
        factor = self.tuner.factor(sigma, blocks)
        return Direction(key, tuple(sigma.tolist()), self.distribution, factor, state.centre)

    def update_(self, theta: Theta, state: History, estimates: Sequence[Estimate], context: StepContext) -> History:
        descend(theta, estimates, context.lr)
        last = estimates[-1]
        moments = torch.tensor(theta.moments(last.direction), dtype=torch.float64)
        return History(torch.tensor(last.direction.sigma), moments, last.loss_plus, last.loss_minus)
