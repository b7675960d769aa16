"""Real runs, differentiated by an evolution strategy over the tuner's weights: no backward pass; memory is that of inference,
and a copy of the weights that are trained.

Antithetic evolution strategy (Salimans et al. 2017, arXiv:1703.03864) over the tuner's weights w: for every pair a direction
delta of standard noise, and runs with w + s delta and w - s delta, members 2 i and 2 i + 1 of the population. All runs start at
the same theta, to the last bit, with the same noise and batches, so only the tuner differs, and any process may evaluate any of
them. The estimate includes everything that a run depends on: the normalizer, the projected gradients, the features of
later steps.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np
import torch

from l2l.estimators import finite_loss
from l2l.meta.state import MemberLoss, MetaLoss, MetaState, PopulationObjective
from l2l.meta.trajectory import inner_steps, put_back, steps_from, trial_steps
from l2l.methods.base import check_choice, check_counts, check_positive
from l2l.noise import Key, standard_noise
from l2l.optim import CurvatureLR
from l2l.tuners.api import Tuner

_RUN = 3
"""Sets the seeds of full runs apart from other random streams."""
_SIGNS = (1.0, -1.0)
"""Of the two members of a pair."""


@final
@dataclass(frozen=True)
class Evolution(PopulationObjective):
    """The loss of batch B after a few steps: ghat = mean over pairs of (L(w + s delta) - L(w - s delta)) / (2 s) * delta.

    ``population`` pairs of runs of ``steps`` steps: 2 * population * (2 * steps + 1) forward passes, and two more for the run
    statistics.
    """

    hands_gradients: ClassVar[bool] = False

    population: int = 4
    """Pairs of tuners tried."""
    scale: float = 0.03
    """s: standard deviation of the change of a weight of the tuner."""
    steps: int = 4
    """Zeroth-order steps of a run, each on a batch of its own."""

    def __post_init__(self) -> None:
        check_counts(population=self.population, steps=self.steps)
        check_positive(scale=self.scale)

    @property
    def members(self) -> int:
        return 2 * self.population

    def member(self, point: MetaState, number: int) -> MemberLoss:
        network, sign = point.method.tuner.network, _SIGNS[number % 2]
        batches = [point.closure, *(point.further(i) for i in range(self.steps - 1))]
        delta = noise_of(network, point.key.with_draw(number // 2))
        with moved(network, delta, sign * self.scale), put_back(point.theta):
            passes = sum(step.report.passes for step in steps_from(point, batches)) + 1
            return MemberLoss(finite_loss(point.other), passes)

    def combined(self, point: MetaState, found: Sequence[MemberLoss]) -> MetaLoss:
        network = point.method.tuner.network
        with trial_steps(point, [point.closure]) as steps:
            own = steps[0]
        estimate = [torch.zeros_like(weight.detach()) for weight in network.parameters()]
        for pair in range(self.population):
            above, below = found[2 * pair : 2 * pair + 2]
            slope = (above.loss - below.loss) / (2 * self.scale * self.population)
            for total, one in zip(estimate, noise_of(network, point.key.with_draw(pair)), strict=True):
                total.add_(one, alpha=slope)
        value = sum(one.loss for one in found) / len(found)
        parts = [torch.sum(w * g) for w, g in zip(network.parameters(), estimate, strict=True)]
        passes = own.report.passes + sum(one.passes for one in found)
        return MetaLoss(torch.stack(parts).sum(), value, value, own.after, own.report, passes)


@final
@dataclass(frozen=True)
class ESFullRun(PopulationObjective):
    """What a user gets: the mean loss over the second half of a fine-tuning run of hundreds of steps at ``lr="auto"``.

    A tuner cannot gain by asking for another learning rate, nor by what pays at once and not later. Ranks stand for losses:
    ghat = mean over runs of (rank / s) * (+-delta), ranks spread evenly over [-1/2, 1/2], so a run that diverges is merely
    the worst, and no task outweighs another by the size of its losses. ``2 * population`` runs of ``steps`` steps: some
    4.4 * population * steps forward passes.
    """

    hands_gradients: ClassVar[bool] = False

    population: int = 5
    """Pairs of tuners tried."""
    scale: float = 0.3
    """s: standard deviation of the change of a weight of the tuner."""
    steps: int = 150
    """Zeroth-order steps of a run, each on a batch of its own."""
    step_fraction: float = 0.1
    """See :class:`l2l.optim.CurvatureLR`."""
    tie: Literal["none", "role"] = "none"
    """``role``: weights that belong to blocks change alike for all blocks whose names differ by the layer's number only:
    far fewer numbers to learn, and the result holds for any depth."""

    def __post_init__(self) -> None:
        check_counts(population=self.population, steps=self.steps)
        check_positive(scale=self.scale, step_fraction=self.step_fraction)
        check_choice("tie", self.tie, ("none", "role"))

    @property
    def members(self) -> int:
        return 2 * self.population

    def member(self, point: MetaState, number: int) -> MemberLoss:
        tuner, sign = point.method.tuner, _SIGNS[number % 2]
        delta = self.delta(tuner, point.key.with_draw(number // 2))
        with moved(tuner.network, delta, sign * self.scale), put_back(point.theta):
            return self._run(point)

    def combined(self, point: MetaState, found: Sequence[MemberLoss]) -> MetaLoss:
        tuner = point.method.tuner
        with trial_steps(point, [point.closure]) as steps:
            own = steps[0]
        pairs = [self.delta(tuner, point.key.with_draw(pair)) for pair in range(self.population)]
        deltas = [[sign * one for one in delta] for delta in pairs for sign in _SIGNS]
        losses = [one.loss for one in found]
        shares = [rank / self.scale for rank in centred_ranks(losses)]
        parts = [
            torch.sum(weight * sum(share * delta[i] for share, delta in zip(shares, deltas, strict=True))) / len(shares)
            for i, weight in enumerate(tuner.network.parameters())
        ]
        finite = [loss for loss in losses if loss < float("inf")]
        value = sum(finite) / len(finite) if finite else float("inf")
        passes = own.report.passes + sum(one.passes for one in found)
        return MetaLoss(torch.stack(parts).sum(), value, own.report.loss, own.after, own.report, passes)

    def delta(self, tuner: Tuner, key: Key) -> list[torch.Tensor]:
        """Standard noise in the shape of each weight of the tuner, tied by role where asked for."""
        delta = noise_of(tuner.network, key)
        if self.tie == "none":
            return delta
        first = first_of_role(tuner.fingerprint.names)
        names = [name for name, _ in tuner.network.named_parameters()]
        return [one if name in tuner.network.shared else one[first] for name, one in zip(names, delta, strict=True)]

    def _run(self, point: MetaState) -> MemberLoss:
        """Mean loss over the second half of a run, infinite if it diverged. The model keeps the weights of its end."""
        theta, method = point.theta, point.method
        # Steps count from 0 as in fine-tuning, and every outer step has a seed of its own.
        words = np.random.SeedSequence((point.key.seed % 2**64, point.key.step, _RUN)).generate_state(1, np.uint64)
        seed = Key(int(words[0]) >> 1)
        batches = ((point.further(number), replace(seed, step=number)) for number in range(self.steps))
        control, taken, late = CurvatureLR(self.step_fraction), [], [float("inf")]
        try:
            for step in inner_steps(theta, method, method.init(theta.blocks), batches, self.step_fraction, control):
                taken.append(step)
            late = [step.report.loss for step in taken[len(taken) // 2 :]]
        except FloatingPointError:
            pass  # the loss is infinite
        return MemberLoss(sum(late) / len(late), sum(step.report.passes for step in taken))


def noise_of(network: torch.nn.Module, key: Key) -> list[torch.Tensor]:
    """Standard noise in the shape of each of the network's weights."""
    weights = network.named_parameters()
    return [standard_noise(f"tuner {name}", key, w.shape, dtype=w.dtype, device=w.device) for name, w in weights]


@contextmanager
def moved(network: torch.nn.Module, delta: list[torch.Tensor], distance: float) -> Iterator[None]:
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


def centred_ranks(losses: Sequence[float]) -> list[float]:
    """Ranks spread evenly over [-1/2, 1/2], the lowest loss first; equal losses share the mean of their ranks."""
    ordered = sorted(losses)
    ranks = [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in losses]
    return [rank / (len(losses) - 1) - 0.5 for rank in ranks] if len(losses) > 1 else [0.0] * len(losses)


def first_of_role(names: Sequence[str]) -> list[int]:
    """For each block, the index of the first block whose name is the same but for numbers: the layer's."""
    roles = [re.sub(r"\d+", "#", name) for name in names]
    return [roles.index(role) for role in roles]
