"""Errors of slope and curvature by epsilon, the epsilon and learning rate that follow from them, and gradient noise.

Along u a loss is L(e) = L0 + g e + c e^2 / 2 + ..., each evaluation with a rounding error. Estimates of the slope g and
the curvature c from L+ and L- then have a rounding error, which falls with e, and a truncation error (the next terms),
which grows as e^2. Both are estimated from losses at several epsilons along the same directions. Pure functions of numpy
arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from l2l.optim import CurvatureLR, CurvatureLRState, curvature, learning_rate

Values = NDArray[np.float64]

LEAST_EPSILONS = 3
"""Fewer epsilons do not tell rounding from truncation."""
TOLERANCE = 0.05
"""The relative error of slope and curvature together up to which an epsilon serves: far below the noise of batches."""
SLACK = 1.5
"""Where no epsilon is that exact: how far above the least error one may lie and still serve."""
FLAT = 2.0
"""Remainders within this factor of the least are rounding; above it truncation has a part in them."""
STANDS_OUT = 2.0
"""A change that is this many times what rounding causes is real."""
STEP_FRACTIONS = 0.1, 0.2
"""Least and largest recommended share of the step to the minimum of the parabola: they serve any model, task and method."""


@dataclass(frozen=True)
class LineLosses:
    """Losses along some directions, each direction on a batch of its own, at the same epsilons."""

    epsilons: Values
    """[epsilons], rising."""
    plus: Values
    """Losses at theta + epsilon u, [directions, epsilons]."""
    minus: Values
    """Losses at theta - epsilon u, [directions, epsilons]."""
    center: Values
    """Losses at theta, [directions]."""

    @property
    def slopes(self) -> Values:
        """(L+ - L-) / (2 epsilon), [directions, epsilons]."""
        return (self.plus - self.minus) / (2 * self.epsilons)

    @property
    def curvatures(self) -> Values:
        """u^T H u = (L+ + L- - 2 L0) / epsilon^2 with its sign, [directions, epsilons]."""
        second = (self.plus - self.center[:, None]) + (self.minus - self.center[:, None])
        return second / self.epsilons / self.epsilons

    def at(self, index: int) -> LineLosses:
        """Those at one epsilon."""
        one = slice(index, index + 1)
        return LineLosses(self.epsilons[one], self.plus[:, one], self.minus[:, one], self.center)


@dataclass(frozen=True)
class Exactness:
    """Slope and curvature at one epsilon, and their errors relative to the slopes' root mean square and to the mean size of
    the curvatures."""

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


@dataclass(frozen=True)
class SlopeNoise:
    """How much of a slope another batch reproduces."""

    signal: float
    """Mean square of the slope that all batches share: E[<grad L, u>^2]."""
    noise: float
    """Mean square of what one batch adds."""
    uncertainty: float
    """Standard error of ``share``."""

    @property
    def share(self) -> float:
        """signal / (signal + noise), at least 0."""
        total = self.signal + self.noise
        return max(0.0, self.signal / total) if total else 0.0


@dataclass(frozen=True)
class Advice:
    """Recommended lr and epsilon, and the figures they rest on."""

    lr: float
    """step_fraction / mean curvature."""
    epsilon: float
    step_fraction: float
    curvature: float
    """Mean of |u^T H u| over the directions."""
    curvature_spread: float
    """Its standard deviation over the directions."""
    ridges: float
    """Share of the directions with negative curvature."""
    signal_share: float
    """Share of the squared slope that another batch reproduces."""
    signal_uncertainty: float
    """Its standard error."""
    lr_best: float
    """lr with the largest expected decrease in one step from the present weights: signal share / mean curvature."""
    lr_highest: float
    """lr above which one step from the present weights is expected to increase the loss: twice that."""
    figures: Exactness
    """Errors of slope and curvature at this epsilon."""


def exactness(losses: LineLosses) -> list[Exactness]:
    """Slope, curvature and their errors by epsilon.

    Raises:
        ValueError: there are fewer than three epsilons, or slopes or curvatures are 0 throughout.
    """
    epsilons = losses.epsilons
    slope, mean_curvature = np.sqrt((losses.slopes**2).mean(0)), losses.curvatures.mean(0)
    columns: list[Values] = [slope, mean_curvature]
    sizes = (losses.slopes, slope), (losses.curvatures, np.abs(losses.curvatures).mean(0))
    noise = np.zeros(len(epsilons))
    for power, (values, size) in enumerate(sizes, start=1):
        variance = rounding(values, power, epsilons)
        noise, bias = np.sqrt(variance), truncation(values, variance, epsilons)
        most_exact = float(size[np.argmin(variance + bias**2)])
        columns += [noise / most_exact, bias / most_exact]
    columns.append(noise * epsilons**2 / 6**0.5)
    return [Exactness(*map(float, row)) for row in zip(epsilons, *columns, strict=True)]


def rounding(values: Values, power: int, epsilons: Values) -> Values:
    """Variance of the rounding error in slopes (power 1) or curvatures (power 2) [directions, epsilons], [epsilons].

    Values at the next two larger epsilons, extended along a line in epsilon^2, predict the one at an epsilon. The
    remainder times epsilon^power is rounding of L+ - L- or of L+ + L- - 2 L0 where epsilon is small, and truncation where
    it is large. So each epsilon takes the mean of those remainders at it and below it that are near their least. Where
    values are exactly 0, on a grid of losses too coarse for their epsilons, they carry no information.

    Raises:
        ValueError: there are fewer than three epsilons, or all values are 0.
    """
    if len(epsilons) < LEAST_EPSILONS:
        raise ValueError(f"{len(epsilons)} epsilons are too few to tell rounding from truncation: try at least 3")
    squares, scatter = epsilons**2, []
    for k in range(len(epsilons) - 2):
        informative = (values[:, k] != 0) | (values[:, k + 1] != 0)
        step = (squares[k + 1] - squares[k]) / (squares[k + 2] - squares[k + 1])
        predicted = (1 + step) * values[:, k + 1] - step * values[:, k + 2]
        shares = np.array([1, (1 + step) * (epsilons[k] / epsilons[k + 1]) ** power])
        rest = epsilons[k] ** power * (values[:, k] - predicted)[informative]
        scatter.append(float((rest**2).mean() / (shares**2).sum()) if informative.any() else None)
    first = next((value for value in scatter if value is not None), None)
    if first is None:
        raise ValueError("the loss has no slope or no curvature along the directions tried: try larger epsilons")
    variances = []
    for k in range(len(epsilons)):
        known = [value for value in scatter[: k + 1] if value is not None] or [first]
        variances.append(float(np.mean([value for value in known if value <= FLAT**2 * min(known)])))
    return np.array(variances) / epsilons ** (2 * power)


def truncation(values: Values, noise: Values, epsilons: Values) -> Values:
    """Root mean square of the part of ``values`` [directions, epsilons] that grows as epsilon^2, [epsilons].

    It is estimated from the change between neighbouring epsilons. Where that does not stand out from rounding, the next
    larger pair whose change does gives the amount per epsilon^2.

    Args:
        noise: variance of rounding in ``values``, [epsilons].
    """
    squares, rounding = epsilons**2, noise[1:] + noise[:-1]
    changes = ((values[:, 1:] - values[:, :-1]) ** 2).mean(0)
    slopes = np.sqrt(np.maximum(changes - rounding, 0)) / (squares[1:] - squares[:-1])
    amounts, last = np.zeros(len(epsilons)), 0.0
    for pair in reversed(range(len(slopes))):
        last = float(slopes[pair]) if changes[pair] > STANDS_OUT**2 * rounding[pair] else last
        amounts[pair + 1] = last
    amounts[0] = last
    return amounts * squares


def choose_epsilon(found: Sequence[Exactness]) -> int:
    """Index of the epsilon to use: the middle of those that serve, since slopes fall and curvatures rise during a run.

    An epsilon serves whose error is at most :data:`TOLERANCE`, or :data:`SLACK` times the least error if that is more.
    Of an even number in the middle, the smaller.
    """
    errors = [one.error for one in found]
    limit = max(TOLERANCE, SLACK * min(errors))
    serving = [index for index, error in enumerate(errors) if error <= limit]
    return serving[(len(serving) - 1) // 2]


def slope_noise(first: Values, second: Values) -> SlopeNoise:
    """Signal and noise from the slopes of two batches along the same directions, [directions] each.

    The product of both has the signal's mean, since their noises are independent; it can be negative. Their squares have
    signal and noise.
    """
    products = first * second
    total = float(((first**2 + second**2) / 2).mean())
    signal = float(products.mean())
    spread = float(products.std(ddof=1)) / np.sqrt(len(products)) if len(products) > 1 else float("inf")
    return SlopeNoise(signal, total - signal, float(spread / total) if total else 0.0)


def choose_step_fraction(noise: SlopeNoise) -> float:
    """Half of the signal's share, within :data:`STEP_FRACTIONS`: its expected gain is three quarters of the largest."""
    low, high = STEP_FRACTIONS
    return min(high, max(low, noise.share / 2))


def advise(
    losses: LineLosses,
    noise: SlopeNoise,
    figures: Exactness,
    step_fraction: float | None = None,
    resolution: float = CurvatureLR.resolution,
) -> Advice:
    """Recommend lr and epsilon.

    Args:
        losses: at one epsilon, the one chosen, along every direction.
        step_fraction: None: by :func:`choose_step_fraction`.
        resolution: as in :class:`l2l.optim.CurvatureLR`: the relative error that a loss may have.
    """
    epsilon = float(losses.epsilons[0])
    triples = zip(losses.plus[:, 0].tolist(), losses.minus[:, 0].tolist(), losses.center.tolist(), strict=True)
    sizes = [curvature(*triple, epsilon, resolution) for triple in triples]
    share = step_fraction or choose_step_fraction(noise)
    mean = CurvatureLRState(fmean(sizes), 1.0)
    return Advice(
        lr=learning_rate(share, mean),
        epsilon=epsilon,
        step_fraction=share,
        curvature=mean.average,
        curvature_spread=stdev(sizes) if len(sizes) > 1 else 0.0,
        ridges=float(np.mean(losses.curvatures[:, 0] < 0)),
        signal_share=noise.share,
        signal_uncertainty=noise.uncertainty,
        lr_best=learning_rate(noise.share, mean),
        lr_highest=learning_rate(2 * noise.share, mean),
        figures=figures,
    )


def expected_change(advice: Advice, lr: float) -> float:
    """Expected change of the loss in a step with ``lr``, in units of signal^2 / (total * curvature) / 2.

    Along u the loss changes by -lr g G + lr^2 g^2 c / 2 with g the slope of the batch, G that of all batches, c the
    curvature; the mean is -lr signal + lr^2 total c / 2. The best lr gives -1, 0 and ``lr_highest`` give 0.
    """
    if not advice.lr_best:
        return float("inf")
    ratio = lr / advice.lr_best
    return ratio**2 - 2 * ratio


def reasons(advice: Advice, tried: Sequence[float], directions: int) -> list[str]:
    """Two sentences on why, and one for each caution.

    Args:
        tried: epsilons.
        directions: number of directions that the figures are means over.
    """

    def percent(share: float) -> str:
        return f"{100 * share:.2g} %"

    one, error = advice.figures, advice.figures.error
    found = [
        f"epsilon {advice.epsilon:.3g}: rounding, about {one.loss_rounding:.1e} of a loss, blurs the slope there by "
        f"{percent(one.slope_rounding)} and the curvature by {percent(one.curvature_rounding)}, while truncation bends "
        f"them by {percent(one.slope_truncation)} and {percent(one.curvature_truncation)}.",
        f"lr {advice.lr:.3g}: step_fraction {advice.step_fraction:.3g} over the mean curvature {advice.curvature:.4g} "
        f"(standard deviation {advice.curvature_spread:.2g} over {directions} directions); {advice.signal_share:.0%} +- "
        f"{advice.signal_uncertainty:.0%} of the squared slope is what another batch repeats, so a step is expected to "
        f"gain most at lr {advice.lr_best:.2g} and to lose above {advice.lr_highest:.2g}.",
    ]
    if advice.signal_share < 2 * advice.signal_uncertainty:
        found.append("How far lr may go is not known: the signal drowns in noise; use more probes or larger batches.")
    elif advice.lr > advice.lr_highest:
        found.append("Batches are so noisy that this lr is expected to lose at first: use larger batches, or a lower lr.")
    if error > 0.5 and advice.epsilon == max(tried):
        found.append(f"Slope and curvature are off by {error:.0%} even here: try larger epsilons.")
    elif error > 0.5:
        found.append(f"Slope and curvature are off by {error:.0%} even here: use float32, or trust neither too far.")
    if advice.ridges > 0.5:
        found.append(f"Along {advice.ridges:.0%} of the directions the loss curves downwards: probe again after some steps.")
    return found
