"""What a zeroth-order step changes in expectation over its noise: closed forms, without the noise of the direction.

To second order one step changes the loss by
-lr * sum_k lambda_k G_k + (lr^2 / 2) * (sum_k lambda_k G'_k) * (sum_k lambda_k T_k) and a smaller term, with
lambda_k = (factor * sigma_k)^2 per component (:mod:`l2l.meta.statistics`), G_k the squared norm of the full gradient, G'_k that
of a batch's gradient, T_k the trace of the Hessian.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final, get_args

import torch

from l2l.meta.curvature import Trace, hessian_traces
from l2l.meta.state import MetaLoss, MetaState, Objective
from l2l.meta.statistics import Components, GradientStatistics, gradient_statistics, surrogate_of
from l2l.meta.trajectory import InnerStep, trial_steps
from l2l.methods.base import check_choice, check_counts, check_positive
from l2l.params import Direction
from l2l.tuners.api import Tuner


@final
@dataclass(frozen=True)
class Expected(Objective):
    """The first-order term, -lr * sum_k lambda_k <gA_k, gB_k>: the inner product of two batches' gradients is unbiased for the
    squared norm of the full gradient, which one batch's own norm is not.

    Two forward passes, and two forward and backward passes at theta. Holds one gradient of the model.
    """

    keep: bool = True
    """Hold a gradient while the other is taken. False: none is held, for one more pass over both batches."""
    through_normaliser: bool = False
    """Whether the slope includes that a larger sigma lowers the common factor. False: the factor is a constant, as in the
    paper, so that every larger sigma seems good, also where the normalizer undoes it."""

    def __call__(self, point: MetaState) -> MetaLoss:
        probe = probe_step(point)
        found = gradient_statistics(point, probe.components, self.keep)
        form = first_order(probe.energies, found.signal, point.lr)
        return closed_form_loss(point, probe, form, found.loss, found.passes, self.through_normaliser)


@dataclass(frozen=True)
class Curved(Objective):
    """Objectives that need the traces of the Hessian."""

    trace: Trace = "fisher"
    """Estimate of the traces: ``fisher``: a forward and backward pass per probe, ``hutchinson`` and ``seen``: two."""
    probes: int = 1
    """Estimates of the traces that are averaged."""
    keep: bool = True
    """As in ``expected``."""

    def __post_init__(self) -> None:
        check_counts(probes=self.probes)
        check_choice("trace", self.trace, get_args(Trace))

    def measure(self, point: MetaState) -> tuple["Probe", GradientStatistics, torch.Tensor, int]:
        """A step that has been undone, statistics of the gradient, traces [components], and passes spent on the latter two."""
        probe = probe_step(point)
        found = gradient_statistics(point, probe.components, self.keep)
        trace, passes = hessian_traces(point, probe.components, probe.direction, self.trace, self.probes)
        return probe, found, trace, found.passes + passes


@final
@dataclass(frozen=True)
class ExpectedCurvature(Curved):
    """Both terms. At the cost of ``expected`` and of the traces. Every estimate is unbiased; so is the product with
    ``hutchinson`` and ``fisher``, up to what batch A contributes to both factors."""

    through_normaliser: bool = False
    """As in ``expected``."""

    def __call__(self, point: MetaState) -> MetaLoss:
        probe, found, trace, passes = self.measure(point)
        form = second_order(probe.energies, found.signal, found.noisy, trace, point.lr)
        return closed_form_loss(point, probe, form, found.loss, passes, self.through_normaliser)


@final
@dataclass(frozen=True)
class LogProgressRate(Curved):
    """Progress per step at its best learning rate: neither a learning rate nor the scale of sigma enters.

    The best lr makes the second-order form -(sum lambda G)^2 / (2 * sum lambda G' * sum lambda T). The negative logarithm of
    that progress, log(sum lambda T) + log(sum lambda G') - 2 log(sum lambda G) up to a constant, is taken with running averages
    of G, G', T per task: noise would dominate a quotient of single estimates. At the cost of ``expected_curvature``; the state
    is three numbers per component and task, and their weight.
    """

    decay: float = 0.9
    """Share of the averages that is kept from one outer step of a task to its next; 0: no averaging."""
    floor: float = 0.01
    """Sum lambda G counts as at least this share of sum lambda G', and sum lambda T as at least this share of sum lambda |T|:
    either estimate may be negative, and a logarithm follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(floor=self.floor)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")

    def __call__(self, point: MetaState) -> MetaLoss:
        probe, found, trace, passes = self.measure(point)
        now = {"signal": found.signal, "noisy": found.noisy, "trace": trace}
        memory = averaged(point.memory, now, self.decay)
        form = log_progress_rate(probe.energies, memory["signal"], memory["noisy"], memory["trace"], self.floor)
        return closed_form_loss(point, probe, replace(form, memory=memory), found.loss, passes)


@dataclass(frozen=True)
class Probe:
    """A zeroth-order step at theta that has been undone, the first direction along which it evaluated the loss, the components
    of that, and lambda_k [components] float64."""

    step: InnerStep
    direction: Direction
    components: Components
    energies: torch.Tensor


def probe_step(point: MetaState) -> Probe:
    """Take a zeroth-order step and undo it: two forward passes, so that run statistics are those of fine-tuning."""
    with trial_steps(point, [point.closure]) as steps:
        step = steps[0]
    direction = step.report.estimates[0].direction
    components = Components(point.theta.blocks, direction.basis and direction.basis.vectors)
    return Probe(step, direction, components, (direction.factor * components.scales(direction)) ** 2)


@dataclass(frozen=True)
class ClosedForm:
    """The value of an objective, and its derivative in every lambda_k, [components] float64."""

    value: float
    slope: torch.Tensor
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)


def first_order(energies: torch.Tensor, signal: torch.Tensor, lr: float) -> ClosedForm:
    """-lr * sum_k lambda_k G_k."""
    return ClosedForm(-lr * torch.dot(energies, signal).item(), -lr * signal)


def second_order(
    energies: torch.Tensor, signal: torch.Tensor, noisy: torch.Tensor, trace: torch.Tensor, lr: float
) -> ClosedForm:
    """-lr * sum_k lambda_k G_k + (lr^2 / 2) * (sum_k lambda_k G'_k) * (sum_k lambda_k T_k)."""
    first, half = first_order(energies, signal, lr), lr**2 / 2
    spread, bend = torch.dot(energies, noisy).item(), torch.dot(energies, trace).item()
    return ClosedForm(first.value + half * spread * bend, first.slope + half * (noisy * bend + trace * spread))


def averaged(memory: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor], decay: float) -> dict[str, torch.Tensor]:
    """Running averages with the new figures in them, and their weight, by which they are unbiased from the first on."""
    before = memory.get("weight", torch.zeros((), dtype=torch.float64))
    weight = decay * before + (1 - decay)
    share = (1 - decay) / weight
    mean = {name: value if not before else memory[name].lerp(value, share) for name, value in now.items()}
    return {**mean, "weight": weight}


def log_progress_rate(
    energies: torch.Tensor, signal: torch.Tensor, noisy: torch.Tensor, trace: torch.Tensor, floor: float
) -> ClosedForm:
    """log(sum lambda T) + log(sum lambda G') - 2 log(sum lambda G); where a sum is raised to its floor, its slope is kept.
    FloatingPointError where a figure is nan, or the gradient or its curvature is zero everywhere."""
    spread, gain, bend = (torch.dot(energies, of).item() for of in (noisy, signal, trace))
    if math.isnan(gain) or math.isnan(bend):
        raise FloatingPointError("a statistic of the gradient is nan: lower epsilon, or look for overflowing inputs")
    gain = max(gain, floor * spread)
    bend = max(bend, floor * torch.dot(energies, trace.abs()).item())
    if not min(spread, gain, bend) > 0:
        raise FloatingPointError(
            f"log_progress_rate: gradient {gain}, batch gradient {spread} and curvature {bend} must not be zero"
        )
    value = math.log(bend) + math.log(spread) - 2 * math.log(gain)
    return ClosedForm(value, trace / bend + noisy / spread - 2 * signal / gain)


def closed_form_loss(
    point: MetaState, probe: Probe, form: ClosedForm, loss: float, passes: int, through_normaliser: bool = False
) -> MetaLoss:
    """The objective with d value / d sigma_k = 2 * factor^2 * sigma_k * slope_k. ``through_normaliser`` adds the effect of
    sigma_k on the common factor, which is held constant otherwise."""
    tuner, components, direction = point.method.tuner, probe.components, probe.direction
    slope = 2 * direction.factor**2 * components.scales(direction) * form.slope
    if through_normaliser:
        overall = 2 * torch.dot(probe.energies, form.slope).item()
        slope = slope + overall * log_factor_slope(tuner, components, direction)
    dense, inside = components.split(slope)
    return MetaLoss(
        surrogate=surrogate_of(tuner, tuner.features(probe.step.before), components.blocks.names, dense, inside),
        value=form.value,
        loss=loss,
        history=probe.step.after,
        report=probe.step.report,
        passes=probe.step.report.passes + passes,
        sigma_gradient=dense,
        basis_gradient=inside,
        memory=form.memory,
    )


def log_factor_slope(tuner: Tuner, components: Components, direction: Direction) -> torch.Tensor:
    """d log(factor) / d sigma_k [components] float64, by central differences: cheap, and true of any normalizer."""
    scales = torch.tensor(direction.sigma, dtype=torch.float64)
    if direction.basis is not None:
        scales = torch.stack([scales, torch.tensor(direction.basis_sigma, dtype=torch.float64)], 1)
    width = 1e-4 * scales.square().mean().sqrt().item()
    found = components.zeros()
    for component, (block, kind) in enumerate(components.parts):
        logs = []
        for side in (1.0, -1.0):
            moved = scales.clone()
            moved[block if direction.basis is None else (block, kind)] += side * width
            logs.append(math.log(tuner.factor(moved, components.blocks)))
        found[component] = (logs[0] - logs[1]) / (2 * width)
    return found
