"""``probe.png``: slope, curvature and their errors against epsilon, and what a step is expected to gain against lr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from l2l.probe.advice import expected_change
from l2l.probe.measure import ProbeResult
from l2l.report.files import write_whole


def draw(target: Path, found: ProbeResult) -> Path:
    """Four panels; what was chosen is marked. Written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    try:
        _against_epsilon(axes[0][0], found, found.sweep.slopes, "slope along u (L+ - L-) / 2 epsilon")
        _against_epsilon(axes[0][1], found, found.sweep.curvatures, "curvature along u (L+ + L- - 2 L0) / epsilon²")
        _errors(axes[1][0], found)
        _gain(axes[1][1], found)
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)


def _mark(axis: Any, found: ProbeResult) -> None:
    axis.axvline(found.advice.epsilon, color="black", linestyle="--", linewidth=1, label="epsilon chosen")
    axis.set(xscale="log", xlabel="epsilon")


def _against_epsilon(axis: Any, found: ProbeResult, values: Any, title: str) -> None:
    """One line per direction of the sweep. The scale is that of what is trusted: rounding may be larger by far."""
    for number, row in enumerate(values):
        axis.plot(found.sweep.epsilons, row, marker="o", markersize=3, linewidth=1, label=f"direction {number}")
    _mark(axis, found)
    nearby = values[:, int(np.argmin(np.abs(found.sweep.epsilons - found.advice.epsilon)))]
    reach = 3 * float(np.abs(nearby).max()) or 1.0
    inside = [float(np.clip(limit, -reach, reach)) for limit in (values.min(), values.max())]
    room = 0.05 * (inside[1] - inside[0]) or reach
    axis.set(title=title, ylim=(inside[0] - room, inside[1] + room))


def _errors(axis: Any, found: ProbeResult) -> None:
    names = ("slope_rounding", "slope_truncation", "curvature_rounding", "curvature_truncation", "error")
    for name in names:
        values = [max(getattr(one, name), 1e-12) for one in found.figures]
        style = {"color": "black", "linewidth": 2} if name == "error" else {"linewidth": 1}
        label = "together" if name == "error" else name.replace("_", ", ")
        axis.plot(found.sweep.epsilons, values, label=label, **style)
    _mark(axis, found)
    axis.set(title="relative error", yscale="log")


def _gain(axis: Any, found: ProbeResult) -> None:
    """The expected parabola of a step, in shares of the most that one can gain."""
    advice = found.advice
    axis.axvline(advice.lr, color="black", linestyle="--", linewidth=1, label="lr chosen")
    if advice.lr_best:
        rates = np.linspace(0, max(1.1 * advice.lr_highest, 1.1 * advice.lr), 100)
        axis.plot(rates, [expected_change(advice, lr) for lr in rates.tolist()], label="expected change")
        axis.axvline(advice.lr_highest, color="tab:red", linestyle=":", linewidth=1, label="expected to lose above")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title="expected change of the loss in a step (the best is -1)", xlabel="lr")
