"""Evolution strategies: the members of a population weigh the noise that made them by how well they do in it.

With members at theta + s_i epsilon u_i, s_i = +-1, and shaped losses w_i, theta -= lr / N * sum s_i w_i u_i.
- Salimans et al. 2017, arXiv:1703.03864, Algorithm 1: mirrored members, ranks from -0.5 to 0.5;
- Qiu et al. 2025, arXiv:2509.24372 (ES at scale): N = 30 without mirroring, z-scores;
- Sarkar et al. 2025, arXiv:2511.16652 (EGGROLL): noise A B^T / sqrt(r) in every matrix [m, n], A [m, r] and B [n, r] fresh for
  each direction; z-scores.

Losses stand for negative rewards. Salimans' division by epsilon (sigma there) is part of lr, as in the later papers. Shaping
takes out the scale of the loss, so that lr is of another size than MeZO's. Where all members have one loss, no step is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from l2l.estimators import Estimate, loss_along
from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.methods.fzoo import deviation
from l2l.methods.lozo import LowRank


@final
@dataclass(frozen=True)
class ES(base.CustomEstimator[None]):
    """Steps along the noise of a population, weighed by z-scored or ranked losses."""

    info: ClassVar = base.MethodInfo("Salimans et al. 2017, arXiv:1703.03864; Qiu et al. 2025; EGGROLL, arXiv:2511.16652")
    fixed_points: ClassVar = True
    step_is_normalized = True
    num_directions: int = 15
    """Directions of a step: as many members, or with ``antithetic`` twice as many."""
    antithetic: bool = True
    """Whether a member is evaluated on either side of each direction, or one on one side."""
    rank: int = 0
    """Rank of the noise in matrices (EGGROLL: 1); 0: plain noise."""
    shaping: Literal["z_score", "centered_ranks"] = "z_score"
    """``z_score``: losses less their mean, over their standard deviation. ``centered_ranks``: places from -0.5 to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_counts(0, rank=self.rank)
        base.check_choice("shaping", self.shaping, tuple(SHAPINGS))
        if self.passes < 2:
            raise ValueError("num_directions=1 without antithetic is a population of one: use at least 2, or antithetic")

    @property
    def passes(self) -> float:
        return self.num_directions * (2.0 if self.antithetic else 1.0)

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        return self.unit_direction(blocks, key, LowRank(blocks, self.rank, key) if self.rank else None)

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[Estimates, None]:
        directions = base.directions_of(self, evaluator, state)
        if self.antithetic:
            return tuple(evaluator.two_point(direction, self.epsilon) for direction in directions), state
        directions = [evaluator.transform(direction) for direction in directions]
        losses = [loss_along(evaluator.closure, evaluator.theta, direction, self.epsilon) for direction in directions]
        mean = math.fsum(losses) / len(losses)  # stands for the loss at theta, which nobody evaluates
        pairs = zip(directions, losses, strict=True)
        return tuple(Estimate(u, loss, None, (loss - mean) / self.epsilon) for u, loss in pairs), state

    def update_(self, theta: PerturbedParameters, state: None, estimates: Estimates, context: StepContext) -> None:
        plus, minus = [e.loss_plus for e in estimates], [e.loss_minus for e in estimates if e.loss_minus is not None]
        shaped = SHAPINGS[self.shaping](plus + minus)
        for i, estimate in enumerate(estimates):
            weight = shaped[i] - (shaped[len(plus) + i] if minus else 0.0)
            theta.add(estimate.direction, [-rate * weight / len(shaped) for rate in context.lr])


def z_scores(values: Sequence[float]) -> list[float]:
    """The values less their mean, over their population standard deviation; all 0 where they are equal."""
    mean, spread = math.fsum(values) / len(values), deviation(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]


def centered_ranks(values: Sequence[float]) -> list[float]:
    """Places of the values in order, from -0.5 for the least to 0.5 for the largest; equal ones share their mean place."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    last = {value: place for place, value in enumerate(ordered)}
    return [(first[value] + last[value]) / 2 / (len(values) - 1) - 0.5 for value in values]


SHAPINGS = {"z_score": z_scores, "centered_ranks": centered_ranks}
