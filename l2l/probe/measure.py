"""The probes themselves: L+, L0 and L- along random directions on training batches. Theta is back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from l2l.estimators.base import Closure
from l2l.estimators.two_point import third_point, two_point
from l2l.finetune.control import CurvatureLR
from l2l.methods.base import Method
from l2l.noise import Key
from l2l.perturb import Direction, PerturbedParameters
from l2l.probe.advice import Advice, advise
from l2l.probe.config import LEAST_EPSILONS, check_plan
from l2l.probe.maths import Exactness, Looks, Values, choose_epsilon, exactness, slope_noise

Batches: TypeAlias = Callable[[int, int], Closure]
"""``batches(step, number)``: the loss on the batch of a step (number 0), or on another batch of the same step (1)."""


@dataclass(frozen=True)
class ProbeResult:
    """What the probes saw, and the advice they give."""

    sweep: Looks
    """Along the first directions at every epsilon."""
    chosen: Looks
    """Along all directions at the epsilon chosen."""
    again: Values
    """Slopes along the same directions on other batches, [directions]."""
    figures: tuple[Exactness, ...]
    """By epsilon."""
    dropped: tuple[float, ...]
    """Epsilons at which a loss was not finite, and all larger ones."""
    passes: int
    """Forward passes spent."""
    advice: Advice


@contextmanager
def restored(theta: PerturbedParameters) -> Iterator[None]:
    """Inside, theta may be walked; afterwards its blocks hold what they held, bit for bit.

    Walking in place comes back within a rounding, so the weights are kept meanwhile: once more their memory. Walking
    exactly never touches them.
    """
    theta.restore()
    kept: dict[str, Tensor] = {}
    if theta.mode == "in_place":
        kept = {block.name: block.tensor.detach().clone() for block in theta.blocks}
    try:
        yield
    finally:
        theta.restore()
        if kept:
            theta.assign(kept)


class _Prober:
    """Looks along the directions of a method where theta stands, and counts what that costs."""

    def __init__(
        self, theta: PerturbedParameters, method: Method[Any], batches: Batches, seed: int, advance: Callable[[float], None]
    ) -> None:
        self.theta, self.method, self.batches, self.seed, self.advance = theta, method, batches, seed, advance
        self.state = method.init(theta.blocks)
        self.passes = 0

    def direction(self, step: int) -> Direction:
        return self.method.direction(self.theta.blocks, self.state, Key(self.seed, step))

    def _closure(self, step: int, number: int) -> Closure:
        own = self.batches(step, number)

        def counted() -> Tensor | float:
            self.passes += 1
            return own()

        return counted

    def home(self, step: int, direction: Direction) -> float:
        return third_point(self._closure(step, 0), self.theta, direction)

    def sides(self, step: int, number: int, direction: Direction, epsilon: float) -> tuple[float, float]:
        seen = two_point(self._closure(step, number), self.theta, direction, epsilon)
        self.advance(seen.loss)
        return seen.losses[0], seen.losses[1]


def measure(
    theta: PerturbedParameters,
    method: Method[Any],
    batches: Batches,
    probes: int,
    sweep: int,
    epsilons: Sequence[float],
    seed: int = 0,
    beta: float | None = None,
    resolution: float = CurvatureLR.resolution,
    advance: Callable[[float], None] = lambda loss: None,
) -> ProbeResult:
    """Probe the loss and advise. Theta stands where it stood afterwards, bit for bit.

    Args:
        batches: the losses to look at; see :data:`Batches`.
        probes, sweep, epsilons, beta: as in :class:`l2l.probe.config.ProbeConfig`.
        resolution: as in :class:`l2l.finetune.control.StepControl`.
        advance: called with a loss after each pair of looks: ``pairs(...)`` times, fewer where epsilons are dropped.

    Raises:
        ValueError: a plan that means nothing, or a loss that does not depend on theta.
        FloatingPointError: a loss is not finite where theta stands, or at all but a few epsilons.
    """
    check_plan(probes, sweep, epsilons)
    prober = _Prober(theta, method, batches, seed, advance)
    with restored(theta):
        looks = _sweep(prober, sweep, sorted(epsilons))
        figures = exactness(looks)
        index = choose_epsilon(figures)
        chosen, again = _probe(prober, looks.at(index), probes)
    noise = slope_noise(chosen.slopes[:, 0], again)
    advice = advise(chosen, noise, figures[index], beta, resolution)
    dropped = tuple(sorted(set(epsilons) - set(looks.epsilons.tolist())))
    return ProbeResult(looks, chosen, again, tuple(figures), dropped, prober.passes, advice)


def pairs(probes: int, sweep: int, epsilons: int) -> int:
    """Pairs of looks that :func:`measure` takes: what a progress bar counts."""
    return sweep * epsilons + (probes - sweep) + probes


def _sweep(prober: _Prober, count: int, epsilons: Sequence[float]) -> Looks:
    """Every epsilon along the first directions; from the first that overflows on, epsilons are left out."""
    usable, homes, sides = len(epsilons), [], []
    for step in range(count):
        with prober.theta.step():
            direction = prober.direction(step)
            homes.append(prober.home(step, direction))
            row: list[tuple[float, float]] = []
            try:
                for epsilon in epsilons[:usable]:
                    row.append(prober.sides(step, 0, direction, epsilon))
            except FloatingPointError as error:
                usable = len(row)
                if usable < LEAST_EPSILONS:
                    raise FloatingPointError(
                        f"at epsilon={epsilons[usable]:g}: try smaller epsilons; {error}"
                    ) from error
            sides.append(row)
    seen = np.array([row[:usable] for row in sides], dtype=np.float64)
    return Looks(np.array(epsilons[:usable]), seen[:, :, 0], seen[:, :, 1], np.array(homes))


def _probe(prober: _Prober, begun: Looks, probes: int) -> tuple[Looks, Values]:
    """All directions at one epsilon, those of the sweep taken over, and their slopes on a second batch."""
    epsilon, done = float(begun.epsilons[0]), len(begun.home)
    rows, again = [], []
    for step in range(probes):
        with prober.theta.step():
            direction = prober.direction(step)
            if step >= done:
                home = prober.home(step, direction)
                rows.append((*prober.sides(step, 0, direction, epsilon), home))
            plus, minus = prober.sides(step, 1, direction, epsilon)
            again.append((plus - minus) / (2 * epsilon))
    new = np.array(rows, dtype=np.float64).reshape(-1, 3)
    sides = [np.concatenate([old, new[:, i : i + 1]]) for i, old in enumerate((begun.plus, begun.minus))]
    return Looks(begun.epsilons, sides[0], sides[1], np.concatenate([begun.home, new[:, 2]])), np.array(again)
