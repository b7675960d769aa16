"""Progress per zeroth-order step at its best learning rate: neither a learning rate nor the scale of sigma enters.

At the best lr, the second-order form of :mod:`l2l.meta.objectives.expected` is -(sum lambda G)^2 / (2 * sum lambda G' * sum
lambda T). The negative logarithm of that progress, log(sum lambda T) + log(sum lambda G') - 2 log(sum lambda G) up to a
constant, is taken with running averages of G, G', T per task: noise would dominate a quotient of single estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from l2l.meta.curvature import Trace, check_trace, hessian_traces
from l2l.meta.objectives.expected import ClosedForm, closed_form_loss, probe_step
from l2l.meta.state import MetaLoss, MetaState, Objective
from l2l.meta.statistics import gradient_statistics
from l2l.methods.base import check_positive


@final
@dataclass(frozen=True)
class LogProgressRate(Objective):
    """At the cost of ``expected_curvature``; its state is three numbers per component and task, and their weight."""

    trace: Trace = "fisher"
    """As in ``expected_curvature``."""
    probes: int = 1
    """Estimates of the traces that are averaged."""
    decay: float = 0.9
    """Share of the averages that is kept from one outer step of a task to its next; 0: no averaging."""
    floor: float = 0.01
    """Sum lambda G counts as at least this share of sum lambda G', and sum lambda T as at least this share of sum lambda |T|:
    either estimate may be negative, and a logarithm follows."""
    keep: bool = True
    """As in ``expected``."""

    def __post_init__(self) -> None:
        check_trace(self.trace, self.probes)
        check_positive(floor=self.floor)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")

    def __call__(self, point: MetaState) -> MetaLoss:
        probe = probe_step(point)
        found = gradient_statistics(point, probe.components, self.keep)
        trace, passes = hessian_traces(point, probe.components, probe.direction, self.trace, self.probes)
        now = {"signal": found.signal, "noisy": found.noisy, "trace": trace}
        memory = averaged(point.memory, now, self.decay)
        form = log_progress_rate(probe.energies, memory["signal"], memory["noisy"], memory["trace"], self.floor)
        form = ClosedForm(form.value, form.slope, memory)
        return closed_form_loss(point, probe, form, found.loss, found.passes + passes)


def averaged(memory: Mapping[str, Tensor], now: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """Running averages with the new figures in them, and their weight, by which they are unbiased from the first on."""
    before = memory.get("weight", torch.zeros((), dtype=torch.float64))
    weight = decay * before + (1 - decay)
    share = (1 - decay) / weight
    mean = {name: value if not before else memory[name].lerp(value, share) for name, value in now.items()}
    return {**mean, "weight": weight}


def log_progress_rate(energies: Tensor, signal: Tensor, noisy: Tensor, trace: Tensor, floor: float) -> ClosedForm:
    """log(sum lambda T) + log(sum lambda G') - 2 log(sum lambda G); where a sum is raised to its floor, its slope is kept.

    Raises:
        FloatingPointError: a figure is nan, or the gradient or its curvature is zero everywhere.
    """
    spread = torch.dot(energies, noisy).item()
    gain = _at_least(floor * spread, torch.dot(energies, signal).item())
    bend = _at_least(floor * torch.dot(energies, trace.abs()).item(), torch.dot(energies, trace).item())
    if not min(spread, gain, bend) > 0:
        raise FloatingPointError(
            f"log_progress_rate: gradient {gain}, batch gradient {spread} and curvature {bend} must not be zero"
        )
    value = math.log(bend) + math.log(spread) - 2 * math.log(gain)
    return ClosedForm(value, trace / bend + noisy / spread - 2 * signal / gain)


def _at_least(floor: float, total: float) -> float:
    if math.isnan(total):
        raise FloatingPointError("a statistic of the gradient is nan: lower epsilon, or look for overflowing inputs")
    return max(total, floor)
