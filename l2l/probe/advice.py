"""From what probes saw to what to run with: lr and epsilon, how far lr may go, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from l2l.finetune.control import CurvatureLRState, CurvatureLR, curvature, learning_rate
from l2l.probe.maths import Exactness, Looks, SlopeNoise

BETAS = 0.1, 0.2
"""Shares of the step to the bottom of the parabola that serve whatever the model, task and method."""


@dataclass(frozen=True)
class Advice:
    """What to run with, and what speaks for it."""

    lr: float
    """beta / mean curvature."""
    epsilon: float
    beta: float
    curvature: float
    """Mean of |u^T H u| over the directions."""
    curvature_spread: float
    """Its standard deviation over the directions."""
    ridges: float
    """Share of the directions along which the loss is curved downwards."""
    signal_share: float
    """Share of the squared slope that another batch repeats."""
    signal_uncertainty: float
    """Its standard error."""
    lr_best: float
    """lr at which a step is expected to gain most, where theta stands: signal share / mean curvature."""
    lr_highest: float
    """lr above which a step is expected to lose, where theta stands: twice that."""
    figures: Exactness
    """What epsilon makes of slope and curvature."""


def choose_beta(noise: SlopeNoise) -> float:
    """Half of the signal's share, within :data:`BETAS`: a step is then expected to gain three quarters of the most."""
    low, high = BETAS
    return min(high, max(low, noise.share / 2))


def advise(
    looks: Looks,
    noise: SlopeNoise,
    figures: Exactness,
    beta: float | None = None,
    resolution: float = CurvatureLR.resolution,
) -> Advice:
    """Recommend lr and epsilon.

    Args:
        looks: at one epsilon, the one chosen, along every direction.
        beta: None: by :func:`choose_beta`.
        resolution: as in :class:`l2l.finetune.control.StepControl`: the relative error that a loss may have.
    """
    epsilon = float(looks.epsilons[0])
    triples = zip(looks.plus[:, 0].tolist(), looks.minus[:, 0].tolist(), looks.home.tolist(), strict=True)
    sizes = [curvature(*triple, epsilon, resolution) for triple in triples]
    share = beta or choose_beta(noise)
    mean = CurvatureLRState(fmean(sizes), 1.0)
    return Advice(
        lr=learning_rate(share, mean),
        epsilon=epsilon,
        beta=share,
        curvature=mean.average,
        curvature_spread=stdev(sizes) if len(sizes) > 1 else 0.0,
        ridges=float(np.mean(looks.curvatures[:, 0] < 0)),
        signal_share=noise.share,
        signal_uncertainty=noise.uncertainty,
        lr_best=learning_rate(noise.share, mean),
        lr_highest=learning_rate(2 * noise.share, mean),
        figures=figures,
    )


def expected_change(advice: Advice, lr: float) -> float:
    """What a step with ``lr`` is expected to change the loss by, in units of signal^2 / (total * curvature) / 2.

    Along u the loss moves by -lr g G + lr^2 g^2 c / 2 with g the slope of the batch, G that of all batches, c the
    curvature; the mean is -lr signal + lr^2 total c / 2. The best lr gives -1, 0 and ``lr_highest`` give 0.
    """
    if not advice.lr_best:
        return float("inf")
    ratio = lr / advice.lr_best
    return ratio**2 - 2 * ratio


def reasons(advice: Advice, tried: Sequence[float], directions: int) -> list[str]:
    """Two sentences on why, and one for each thing to beware of."""
    one = advice.figures
    found = [
        f"epsilon {advice.epsilon:.3g}: rounding, about {one.loss_rounding:.1e} of a loss, blurs the slope there by "
        f"{_percent(one.slope_rounding)} and the curvature by {_percent(one.curvature_rounding)}, while truncation bends "
        f"them by {_percent(one.slope_truncation)} and {_percent(one.curvature_truncation)}.",
        f"lr {advice.lr:.3g}: beta {advice.beta:.3g} over the mean curvature {advice.curvature:.4g} (standard deviation "
        f"{advice.curvature_spread:.2g} over {directions} directions); {advice.signal_share:.0%} +- "
        f"{advice.signal_uncertainty:.0%} of the squared slope is what another batch repeats, so a step is expected to "
        f"gain most at lr {advice.lr_best:.2g} and to lose above {advice.lr_highest:.2g}.",
    ]
    return found + cautions(advice, tried)


def cautions(advice: Advice, tried: Sequence[float]) -> list[str]:
    """One sentence for each thing to beware of."""
    found, error = [], advice.figures.error
    if advice.signal_share < 2 * advice.signal_uncertainty:
        found.append("How far lr may go is not known: the signal drowns in noise; use more probes or larger batches.")
    elif advice.lr > advice.lr_highest:
        found.append(
            "Batches are so noisy that this lr is expected to lose at first: use larger batches, or a lower lr."
        )
    if error > 0.5 and advice.epsilon == max(tried):
        found.append(f"Slope and curvature are off by {error:.0%} even here: try larger epsilons.")
    elif error > 0.5:
        found.append(f"Slope and curvature are off by {error:.0%} even here: use float32, or trust neither too far.")
    if advice.ridges > 0.5:
        found.append(
            f"Along {advice.ridges:.0%} of the directions the loss curves downwards: probe again after some steps."
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
