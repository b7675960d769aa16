"""Real runs, differentiated by an evolution strategy over the tuner's weights: no backward pass, the memory of inference.

Antithetic evolution strategy (Salimans et al. 2017, arXiv:1703.03864) over the tuner's weights w: for every pair a direction
delta of standard noise, and runs with w + s delta and w - s delta. All runs start at the same theta with the same noise and
batches, so only the tuner differs. The estimate includes everything that a run depends on: the normalizer, the projected
gradients, the features of later steps.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np
import torch

from l2l.estimators import finite_loss
from l2l.meta.state import MetaLoss, MetaState, Objective
from l2l.meta.trajectory import inner_steps, trial_steps, undo_steps
from l2l.methods.base import check_choice, check_counts, check_positive
from l2l.noise import Key, standard_noise
from l2l.optim import CurvatureLR
from l2l.tuners.api import Tuner

_RUN = 3
"""Sets the seeds of full runs apart from other random streams."""
_UNDO_TOGETHER = 16
"""Steps of a full run that are undone in one traversal of the parameters."""


@final
@dataclass(frozen=True)
class Evolution(Objective):
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

    def __call__(self, point: MetaState) -> MetaLoss:
        network = point.method.tuner.network
        batches = [point.closure, *(point.further(i) for i in range(self.steps - 1))]
        with trial_steps(point, [point.closure]) as steps:
            own = steps[0]
        estimate = [torch.zeros_like(weight.detach()) for weight in network.parameters()]
        ends, passes = [], own.report.passes
        for pair in range(self.population):
            delta = noise_of(network, point.key.with_draw(pair))
            for sign in (1.0, -1.0):
                with moved(network, delta, sign * self.scale), trial_steps(point, batches) as steps:
                    ends.append(finite_loss(point.other))
                    passes += sum(step.report.passes for step in steps) + 1
            slope = (ends[-2] - ends[-1]) / (2 * self.scale * self.population)
            for total, one in zip(estimate, delta, strict=True):
                total.add_(one, alpha=slope)
        value = sum(ends) / len(ends)
        parts = [torch.sum(w * g) for w, g in zip(network.parameters(), estimate, strict=True)]
        return MetaLoss(torch.stack(parts).sum(), value, value, own.after, own.report, passes)


@final
@dataclass(frozen=True)
class ESFullRun(Objective):
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

    def __call__(self, point: MetaState) -> MetaLoss:
        tuner = point.method.tuner
        with trial_steps(point, [point.closure]) as steps:
            own = steps[0]
        deltas, losses, passes = [], [], own.report.passes
        for pair in range(self.population):
            delta = self.delta(tuner, point.key.with_draw(pair))
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
        return MetaLoss(torch.stack(parts).sum(), value, own.report.loss, own.after, own.report, passes)

    def delta(self, tuner: Tuner, key: Key) -> list[torch.Tensor]:
        """Standard noise in the shape of each weight of the tuner, tied by role where asked for."""
        delta = noise_of(tuner.network, key)
        if self.tie == "none":
            return delta
        first = first_of_role(tuner.fingerprint.names)
        names = [name for name, _ in tuner.network.named_parameters()]
        return [one if name in tuner.network.shared else one[first] for name, one in zip(names, delta, strict=True)]

    def _run(self, point: MetaState) -> tuple[float, int]:
        """Mean loss over the second half of a run, infinite if it diverged, and the passes it took."""
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
        finally:
            for end in range(len(taken), 0, -_UNDO_TOGETHER):
                undo_steps(theta, taken[max(0, end - _UNDO_TOGETHER) : end])
        return sum(late) / len(late), sum(step.report.passes for step in taken)


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
