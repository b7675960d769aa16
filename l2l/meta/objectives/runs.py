"""What whole runs reach, by trying: fine-tuning as it is deployed, step control included, over and over with tuners moved.

Evolution strategy with antithetic pairs and ranks for losses (Salimans et al. 2017, arXiv:1703.03864): for each pair
a direction delta of standard noise in the space of the tuner's weights w, runs with w + s delta and with w - s delta,
and ghat = mean over runs of (rank / s) * (+-delta), ranks spread evenly over [-1/2, 1/2]. So a run that diverges is
the worst and nothing more, and no task outweighs another by the size of its losses. All runs start at the same
theta and see the same batches and noise.

Differs from ``evolution``, which asks what a few steps at a constant learning rate do to the loss of one batch, in asking
for what a user gets: the mean loss over the second half of a run of hundreds of steps at ``lr="auto"``. There a tuner
cannot win by asking for another learning rate, nor by what pays at once and not later. Needs the memory of inference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.objectives.evolution import moved, noise_of
from l2l.meta.trajectory import Step, take_back, walked
from l2l.methods.base import check_counts, check_positive
from l2l.noise import Key
from l2l.optim import CurvatureLR, CurvatureLRState, zo_step
from l2l.tuners.api import Tuner

RUN = 3
"""Word that sets the seeds of runs apart from other streams."""
TOGETHER = 16
"""Steps that are taken back in one traversal."""


@final
@dataclass(frozen=True)
class ESFullRun(Objective):
    """``2 * population`` runs of ``steps`` steps: some 4.4 * population * steps forward passes. No gradient, no graph."""

    hands_gradients: ClassVar[bool] = False

    population: int = 5
    """Pairs of tuners tried."""
    scale: float = 0.3
    """How far a weight of the tuner is moved, one standard deviation."""
    steps: int = 150
    """Zeroth-order steps of a run, each on a batch of its own."""
    step_fraction: float = 0.1
    """Of the step control, see :class:`l2l.optim.StepControl`."""
    tie: Literal["none", "role"] = "none"
    """``role``: weights that belong to blocks move alike for all blocks whose names differ by the layer's number only:
    far fewer numbers to learn, and what is learned holds for any depth."""

    def __post_init__(self) -> None:
        check_counts(population=self.population, steps=self.steps)
        check_positive(scale=self.scale, step_fraction=self.step_fraction)
        if self.tie not in ("none", "role"):
            raise ValueError(f"tie={self.tie!r} must be 'none' or 'role'")

    def __call__(self, point: MetaState) -> MetaLoss:
        tuner = point.method.tuner
        with walked(point, [point.closure]) as steps:
            own = steps[0]
        deltas, losses, passes = [], [], own.report.passes
        for pair in range(self.population):
            delta = self._delta(tuner, point.key.with_draw(pair))
            for sign in (1.0, -1.0):
                with moved(tuner.network, delta, sign * self.scale):
                    loss, cost = self._run(point)
                deltas.append([sign * one for one in delta])
                losses.append(loss)
                passes += cost
        shares = [rank / self.scale for rank in centred_ranks(losses)]
        parts = [
            torch.sum(weight * sum(share * delta[i] for share, delta in zip(shares, deltas, strict=True))) / len(shares)
            for i, weight in enumerate(tuner.network.parameters())
        ]
        finite = [loss for loss in losses if loss < float("inf")]
        value = sum(finite) / len(finite) if finite else float("inf")
        start = own.report.loss
        return MetaLoss(torch.stack(parts).sum(), value, start, own.features, own.following, own.report, passes)

    def _delta(self, tuner: Tuner, key: Key) -> list[Tensor]:
        delta = noise_of(tuner.network, key)
        if self.tie == "none":
            return delta
        first = first_of_role(tuner.fingerprint.names)
        named = tuner.network.named_parameters()
        return [
            one if name in tuner.network.shared else one[first] for (name, _), one in zip(named, delta, strict=True)
        ]

    def _run(self, point: MetaState) -> tuple[float, int]:
        """Mean loss over the second half of a run, infinite if it diverged, and the passes it took."""
        theta, method, control, seen = point.theta, point.method, CurvatureLR(self.step_fraction), CurvatureLRState()
        state, taken, losses, passes = method.init(theta.blocks), [], [], 0
        beta, seed = [self.step_fraction] * len(theta.blocks), run_seed(point.key)
        try:
            for number in range(self.steps):
                closure = point.further(number)
                key = replace(seed, step=number)
                features = method.tuner.features(state)
                state, report = zo_step(
                    closure, theta, method, state, key, beta, curvature_lr=control, curvature_lr_state=seen
                )
                amounts = tuple(report.lr[0] * e.projected_gradient / len(report.estimates) for e in report.estimates)
                taken.append(Step(features, state, report, amounts))
                seen, passes = report.curvature_lr_state, passes + report.passes
                losses.append(report.loss)
                theta.raise_deferred_interrupt()
        except FloatingPointError:
            losses = [float("inf")]
        finally:
            for end in range(len(taken), 0, -TOGETHER):
                take_back(theta, taken[max(0, end - TOGETHER) : end])
        late = losses[len(losses) // 2 :]
        return sum(late) / len(late), passes


def run_seed(key: Key) -> Key:
    """The key of a run's first step: steps count from 0 as in fine-tuning, and every outer step has a seed of its own."""
    words = np.random.SeedSequence((key.seed % 2**64, key.step, RUN)).generate_state(1, np.uint64)
    return Key(int(words[0]) >> 1)


def centred_ranks(losses: Sequence[float]) -> list[float]:
    """Ranks spread evenly over [-1/2, 1/2], the lowest loss first; equal losses share the mean of their ranks."""
    if len(losses) < 2:
        return [0.0] * len(losses)
    ordered = sorted(losses)
    mean_rank = {value: ordered.index(value) + (ordered.count(value) - 1) / 2 for value in set(losses)}
    return [mean_rank[value] / (len(losses) - 1) - 0.5 for value in losses]


def first_of_role(names: Sequence[str]) -> list[int]:
    """For each block, the first block whose name is the same but for numbers: the layer's."""
    roles = [re.sub(r"\d+", "#", name) for name in names]
    return [roles.index(role) for role in roles]
