"""What the closed-form objectives share: the deployed step for its history, and lambda's chain rule to sigma.

To second order one zeroth-order step changes the loss in expectation over its noise by
-lr * sum_k lambda_k G_k + (lr^2 / 2) * (sum_k lambda_k G'_k) * (sum_k lambda_k T_k) and a smaller term, with
lambda_k = (factor * sigma_k)^2, G_k the squared norm of the full gradient, G'_k that of a batch's, T_k the Hessian's trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2l.meta.objectives.base import MetaLoss, MetaState
from l2l.meta.statistics import Components, differentiable
from l2l.meta.trajectory import Step, walked
from l2l.params import Direction
from l2l.tuners.api import Tuner


@dataclass(frozen=True)
class Seen:
    """The point as the deployed step sees it."""

    step: Step
    """Taken, for what it leaves to the next point, and taken back."""
    components: Components
    energies: Tensor
    """lambda_k [components] float64."""

    @property
    def direction(self) -> Direction:
        """Where the step looked first."""
        return self.step.report.estimates[0].direction


@dataclass(frozen=True)
class Form:
    """A closed form: its value, and its derivative in every lambda_k."""

    value: float
    slope: Tensor
    """[components] float64."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)


def probe_step(point: MetaState) -> Seen:
    """Take the deployed step and take it back: two forward passes, so that histories are those of fine-tuning."""
    with walked(point, [point.closure]) as steps:
        step = steps[0]
    direction = step.report.estimates[0].direction
    components = Components.of(point.theta.blocks, direction)
    return Seen(step, components, (direction.factor * components.scales(direction)) ** 2)


def outcome_of(
    point: MetaState, seen: Seen, form: Form, loss: float, passes: int, through_normaliser: bool = False
) -> MetaLoss:
    """d value / d sigma_k = 2 * factor^2 * sigma_k * slope_k as the outcome's gradients.

    Args:
        through_normaliser: add what sigma_k does to the common factor, which is held constant otherwise.
    """
    slope = 2 * seen.direction.factor**2 * seen.components.scales(seen.direction) * form.slope
    if through_normaliser:
        overall = 2 * torch.dot(seen.energies, form.slope).item()
        slope = slope + overall * log_factor_slope(point.method.tuner, seen.components, seen.direction)
    dense, inside = seen.components.split(slope)
    features = seen.step.features
    return MetaLoss(
        surrogate=differentiable(point.method.tuner, features, point.theta.blocks.names, dense, inside),
        value=form.value,
        loss=loss,
        features=features,
        history=seen.step.following,
        report=seen.step.report,
        passes=seen.step.report.passes + passes,
        sigma_gradient=dense,
        basis_gradient=inside,
        memory=form.memory,
    )


def log_factor_slope(tuner: Tuner, components: Components, direction: Direction) -> Tensor:
    """d log(factor) / d sigma_k [components] float64, by central differences: of any normaliser, and cheap."""
    blocks, table = components.blocks, torch.tensor(direction.sigma, dtype=torch.float64)
    if direction.basis is not None:
        table = torch.stack([table, torch.tensor(direction.basis_sigma, dtype=torch.float64)], 1)
    width = 1e-4 * table.square().mean().sqrt().item()
    found = components.zeros()
    for component, place in enumerate(components.places(direction)):
        logs = []
        for side in (1.0, -1.0):
            moved = table.clone()
            moved[place] += side * width
            logs.append(math.log(tuner.factor(moved, blocks)))
        found[component] = (logs[0] - logs[1]) / (2 * width)
    return found


def first_order(energies: Tensor, signal: Tensor, lr: float) -> Form:
    """-lr * sum_k lambda_k G_k."""
    return Form(-lr * torch.dot(energies, signal).item(), -lr * signal)


def second_order(energies: Tensor, signal: Tensor, noisy: Tensor, trace: Tensor, lr: float) -> Form:
    """-lr * sum_k lambda_k G_k + (lr^2 / 2) * (sum_k lambda_k G'_k) * (sum_k lambda_k T_k)."""
    first, half = first_order(energies, signal, lr), lr**2 / 2
    spread, bend = torch.dot(energies, noisy).item(), torch.dot(energies, trace).item()
    return Form(first.value + half * spread * bend, first.slope + half * (noisy * bend + trace * spread))
