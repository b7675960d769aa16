"""How exact slope and curvature are at each epsilon, which epsilon that speaks for, and how much of a slope is noise.

Along u a loss is L(e) = L0 + g e + c e^2 / 2 + ..., each evaluation off by a rounding error. What L+ and L- give for the
slope g and the curvature c is then off by rounding, which falls with e, and by truncation (the next terms), which grows
as e^2. Both are read off looks at several epsilons along the same directions. Pure functions of numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

TOLERANCE = 0.05
"""The relative error of slope and curvature together up to which an epsilon serves: far below the noise of batches."""
SLACK = 1.5
"""Where no epsilon is that exact: how far above the least error one may lie and still serve."""
FLAT = 2.0
"""Remainders within this factor of the least are rounding; above it truncation has a part in them."""
STANDS_OUT = 2.0
"""A change so many times what rounding makes is real."""


@dataclass(frozen=True)
class Looks:
    """Losses along some directions, each on its own batch, at the same epsilons."""

    epsilons: Values
    """[epsilons], rising."""
    plus: Values
    """Losses at theta + epsilon u, [directions, epsilons]."""
    minus: Values
    """Losses at theta - epsilon u, [directions, epsilons]."""
    home: Values
    """Losses at theta, [directions]."""

    @property
    def slopes(self) -> Values:
        """(L+ - L-) / (2 epsilon), [directions, epsilons]."""
        return (self.plus - self.minus) / (2 * self.epsilons)

    @property
    def bends(self) -> Values:
        """L+ + L- - 2 L0, [directions, epsilons]."""
        return (self.plus - self.home[:, None]) + (self.minus - self.home[:, None])

    @property
    def curvatures(self) -> Values:
        """u^T H u with its sign, [directions, epsilons]."""
        return self.bends / self.epsilons / self.epsilons

    def at(self, index: int) -> Looks:
        """Those at one epsilon."""
        here = slice(index, index + 1)
        return Looks(self.epsilons[here], self.plus[:, here], self.minus[:, here], self.home)


@dataclass(frozen=True)
class Exactness:
    """What an epsilon makes of slope and curvature. Errors are relative: to the slopes' root mean square, and to the mean
    size of the curvatures."""

    epsilon: float
    slope: float
    """Root mean square over the directions."""
    curvature: float
    """Mean over the directions, with its sign."""
    slope_rounding: float
    slope_truncation: float
    curvature_rounding: float
    curvature_truncation: float
    loss_rounding: float
    """Standard deviation of the rounding error of one loss: L+ + L- - 2 L0 has six times its variance."""

    @property
    def error(self) -> float:
        """The four errors together."""
        parts = (self.slope_rounding, self.slope_truncation, self.curvature_rounding, self.curvature_truncation)
        return float(np.sqrt(sum(part**2 for part in parts)))


def rounding(values: Values, power: int, epsilons: Values) -> Values:
    """Variance of the rounding error in slopes (power 1) or curvatures (power 2) [directions, epsilons], [epsilons].

    Values at the next two larger epsilons, extended along a line in epsilon^2, foretell the one at an epsilon. What is
    left over, times epsilon^power, is rounding of L+ - L- or of L+ + L- - 2 L0, where epsilon is small; where it is
    large, truncation. So at each epsilon the least remainders at it and below it speak. Where values are exactly 0, on
    a grid of losses too coarse for their epsilons, they tell nothing.

    Raises:
        ValueError: there are fewer than three epsilons, or all values are 0.
    """
    if len(epsilons) < 3:
        raise ValueError(f"{len(epsilons)} epsilons are too few to tell rounding from truncation: try at least 3")
    squares, scatter = epsilons**2, []
    for k in range(len(epsilons) - 2):
        told = (values[:, k] != 0) | (values[:, k + 1] != 0)
        ahead = (squares[k + 1] - squares[k]) / (squares[k + 2] - squares[k + 1])
        foretold = (1 + ahead) * values[:, k + 1] - ahead * values[:, k + 2]
        shares = np.array([1, (1 + ahead) * (epsilons[k] / epsilons[k + 1]) ** power])
        rest = epsilons[k] ** power * (values[:, k] - foretold)[told]
        scatter.append(float((rest**2).mean() / (shares**2).sum()) if told.any() else None)
    return np.array(_running(scatter, len(epsilons))) / epsilons ** (2 * power)


def _running(scatter: Sequence[float | None], count: int) -> list[float]:
    """At each of ``count`` epsilons, the mean of those scatters up to it that are near the least of them."""
    first = next((value for value in scatter if value is not None), None)
    if first is None:
        raise ValueError("the loss has no slope or no curvature along the directions tried: try larger epsilons")
    found = []
    for k in range(count):
        seen = [value for value in scatter[: k + 1] if value is not None] or [first]
        found.append(float(np.mean([value for value in seen if value <= FLAT**2 * min(seen)])))
    return found


def truncation(values: Values, noise: Values, epsilons: Values) -> Values:
    """Root mean square of the part of ``values`` [directions, epsilons] that grows as epsilon^2, [epsilons].

    It shows in the change from each epsilon to the next. Where that does not stand out from rounding, the next larger
    pair that does tells how much there is per epsilon^2.

    Args:
        noise: variance of rounding in ``values``, [epsilons].
    """
    squares, rounding = epsilons**2, noise[1:] + noise[:-1]
    changes = ((values[:, 1:] - values[:, :-1]) ** 2).mean(0)
    told = np.sqrt(np.maximum(changes - rounding, 0)) / (squares[1:] - squares[:-1])
    amounts, last = np.zeros(len(epsilons)), 0.0
    for pair in reversed(range(len(told))):
        last = float(told[pair]) if changes[pair] > STANDS_OUT**2 * rounding[pair] else last
        amounts[pair + 1] = last
    amounts[0] = last
    return amounts * squares


def exactness(looks: Looks) -> list[Exactness]:
    """What each epsilon makes of slope and curvature.

    Raises:
        ValueError: there are fewer than three epsilons, or slopes or curvatures are 0 throughout.
    """
    epsilons = looks.epsilons
    slope_noise, slope_bias, slope = _errors(looks.slopes, 1, epsilons, np.sqrt((looks.slopes**2).mean(0)))
    noise, bias, size = _errors(looks.curvatures, 2, epsilons, np.abs(looks.curvatures).mean(0))
    columns = (
        np.sqrt((looks.slopes**2).mean(0)),
        looks.curvatures.mean(0),
        slope_noise / slope,
        slope_bias / slope,
        noise / size,
        bias / size,
        noise * epsilons**2 / 6**0.5,
    )
    return [Exactness(*map(float, row)) for row in zip(epsilons, *columns, strict=True)]


def _errors(values: Values, power: int, epsilons: Values, sizes: Values) -> tuple[Values, Values, float]:
    """Rounding and truncation in ``values``, and the size of what they are errors of, where it is most exact."""
    noise = rounding(values, power, epsilons)
    bias = truncation(values, noise, epsilons)
    return np.sqrt(noise), bias, float(sizes[np.argmin(noise + bias**2)])


def choose_epsilon(found: Sequence[Exactness]) -> int:
    """Index of the epsilon to use: the middle of those that serve, since slopes fall and curvatures rise as a run goes on.

    An epsilon serves whose error is at most :data:`TOLERANCE`, or :data:`SLACK` times the least error if that is more.
    Of an even number in the middle, the smaller.
    """
    errors = [one.error for one in found]
    limit = max(TOLERANCE, SLACK * min(errors))
    serving = [index for index, error in enumerate(errors) if error <= limit]
    return serving[(len(serving) - 1) // 2]


@dataclass(frozen=True)
class SlopeNoise:
    """How much of a slope another batch repeats."""

    signal: float
    """Mean square of the slope that all batches share: E[<grad L, u>^2]."""
    noise: float
    """Mean square of what one batch adds."""
    uncertainty: float
    """Standard error of ``share``."""

    @property
    def share(self) -> float:
        """signal / (signal + noise), at least 0: what part of a step's energy points where all batches point."""
        total = self.signal + self.noise
        return max(0.0, self.signal / total) if total else 0.0


def slope_noise(first: Values, second: Values) -> SlopeNoise:
    """Signal and noise from the slopes of two batches along the same directions, [directions] each.

    The product of both has the signal's mean, since their noises are independent; it can come out negative. Their
    squares have signal and noise.
    """
    products = first * second
    total = float(((first**2 + second**2) / 2).mean())
    signal = float(products.mean())
    spread = float(products.std(ddof=1)) / np.sqrt(len(products)) if len(products) > 1 else float("inf")
    return SlopeNoise(signal, total - signal, float(spread / total) if total else 0.0)
