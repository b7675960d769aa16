"""Progress per zeroth-order step where its learning rate is tuned: no learning rate, and no scale of sigma, is in it.

The best lr of the second-order form gains (sum lambda G)^2 / (2 * sum lambda G' * sum lambda T). Its negative logarithm,
log(sum lambda T) + log(sum lambda G') - 2 log(sum lambda G), is taken with running averages of G, G', T per task: a quotient of
single estimates would be dominated by noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from l2l.meta.closed_form import Form, outcome_of, probe_step
from l2l.meta.curvature import Trace, check_trace, traces
from l2l.meta.objectives.base import MetaLoss, MetaState, Objective
from l2l.meta.statistics import gradient_statistics, spent
from l2l.methods.base import check_positive


@final
@dataclass(frozen=True)
class LogProgressRate(Objective):
    """The cost of ``expected_curvature``; remembers three numbers per component and task, and how much they weigh."""

    trace: Trace = "fisher"
    """As in ``expected_curvature``."""
    probes: int = 1
    """Estimates of the traces that are averaged."""
    decay: float = 0.9
    """Share of the averages that is kept from point to point; 0: this point alone."""
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
        seen = probe_step(point)
        found = gradient_statistics(point, seen.components, self.keep)
        trace, passes = traces(point, seen.components, seen.direction, self.trace, self.probes)
        now = {"signal": found.signal, "noisy": found.noisy, "trace": trace}
        memory = averaged(point.memory, now, self.decay)
        form = log_ratio(seen.energies, memory["signal"], memory["noisy"], memory["trace"], self.floor)
        return outcome_of(point, seen, Form(form.value, form.slope, memory), found.loss, found.passes + passes)


def averaged(memory: Mapping[str, Tensor], now: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """Running averages with this point's figures, and their weight: all points count as they should from the first on."""
    before = memory.get("weight", torch.zeros((), dtype=torch.float64))
    weight = decay * before + (1 - decay)
    share = (1 - decay) / weight
    mean = {name: value if not before else memory[name].lerp(value, share) for name, value in now.items()}
    return {**mean, "weight": weight}


def log_ratio(energies: Tensor, signal: Tensor, noisy: Tensor, trace: Tensor, floor: float) -> Form:
    """log(sum lambda T) + log(sum lambda G') - 2 log(sum lambda G); where a sum is raised to its floor, its slope is kept.

    Raises:
        FloatingPointError: a figure is nan, or the gradient or its curvature is zero everywhere.
    """
    spread = torch.dot(energies, noisy).item()
    gain = spent(torch.dot(energies, signal).item(), floor * spread)
    bend = spent(torch.dot(energies, trace).item(), floor * torch.dot(energies, trace.abs()).item())
    if not min(spread, gain, bend) > 0:
        raise FloatingPointError(
            f"ratio: gradient {gain}, batch gradient {spread} and curvature {bend} must not be zero"
        )
    value = math.log(bend) + math.log(spread) - 2 * math.log(gain)
    return Form(value, trace / bend + noisy / spread - 2 * signal / gain)
