"""The figures of a comparison: average ranks, wins, loss against passes and against seconds, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from l2l.experiments.console import plot_matrix
from l2l.experiments.runner import Cell, step_curve
from l2l.experiments.stats import (
    WINDOW_SHARE,
    Curve,
    average_ranks,
    by_rank,
    mean_by_x,
    rank_intervals,
    smoothed,
    win_shares,
)
from l2l.experiments.tables import MEBIBYTE, Field, least_peak
from l2l.report.files import write_whole
from l2l.report.run_directory import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
"""Most panels beside each other."""


def draw_all(folder: Path, field: Field) -> dict[str, Path]:
    """Every figure, by what it shows."""
    found = _draw_wins(folder, field)
    for name, part in field.places.items():
        words = "-".join(part.cells[0][:2])
        if len(field.places) > 1 and part.everywhere:
            found[f"{name}: average rank"] = draw_ranks(folder / f"ranks-{words}.png", part)
        curves = {cell.task: mean_curves(part, cell) for cell in part.cells}
        for axis, label in (("passes", "forward passes"), ("seconds", "seconds of training")):
            panels = {task: both[axis] for task, both in curves.items()}
            target = folder / f"loss-{axis}-{words}.png"
            found[f"{name}: loss against {label}"] = draw_curves(target, panels, part.ordered, label)
        found[f"{name}: memory"] = draw_memory(folder / f"memory-{words}.png", part)
    return found


def _draw_wins(folder: Path, field: Field) -> dict[str, Path]:
    """Ranks and wins of the methods that ran everywhere."""
    everywhere = field.everywhere
    if not everywhere:
        return {}
    order = by_rank(everywhere, field.losses)
    places = [everywhere.index(label) for label in order]
    shares = np.array(win_shares(field.losses))[np.ix_(places, places)].tolist()
    return {
        "Average rank over all cells": draw_ranks(folder / "ranks.png", field),
        "Who ends below whom": plot_matrix(folder / "wins.png", order, shares),
    }


def mean_curves(field: Field, cell: Cell) -> dict[str, dict[str, Curve]]:
    """``passes`` and ``seconds`` -> method -> smoothed loss of its steps, mean over the seeds that did not diverge.

    Seconds are the mean over these seeds of the seconds spent by then.
    """
    passes: dict[str, Curve] = {}
    seconds: dict[str, Curve] = {}
    for label in field.labels:
        runs = [result.run for result in field.runs.get((cell, label), ()) if result.status == "ok"]
        points, clocks = [], []
        for run in runs:
            points += smoothed(step_curve(Path(run.folder)), WINDOW_SHARE * run.passes)
            clocks.append(clock(Path(run.folder)))
        if points:
            passes[label] = curve = mean_by_x(points)
            spent = np.mean([_at([x for x, _ in curve], times) for times in clocks], axis=0)
            seconds[label] = [(float(second), loss) for second, (_, loss) in zip(spent, curve, strict=True)]
    return {"passes": passes, "seconds": seconds}


def _at(where: Sequence[float], curve: Curve) -> NDArray[np.float64]:
    """The curve's values at some x, along straight lines between its points."""
    return np.interp(where, [x for x, _ in curve], [y for _, y in curve])


def clock(folder: Path) -> Curve:
    """(passes spent, seconds of training by then) of a run, from 0 to its end."""
    rows = read_metrics(folder / METRICS)
    return [(0.0, 0.0), *((float(row["passes"]), float(row["seconds"])) for row in rows)]


def _style(order: Sequence[str], label: str) -> dict[str, Any]:
    """The same colour and line for a method in every figure of a comparison."""
    place = sorted(order).index(label)
    return {"color": f"C{place % 10}", "linestyle": ("-", "--", ":", "-.")[place // 10 % 4]}


def draw_curves(target: Path, panels: Mapping[str, Mapping[str, Curve]], order: Sequence[str], x_label: str) -> Path:
    """A panel per task, a line per method, one legend; written whole."""
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    figure, axes = _canvas(rows, columns, (5 * columns + 2.5, max(3.6 * rows, 0.19 * len(order) + 0.5)))
    for place, (task, curves) in enumerate(panels.items()):
        axis = axes[place // columns][place % columns]
        for label, curve in curves.items():
            axis.plot([x for x, _ in curve], [y for _, y in curve], label=label, linewidth=1.2, **_style(order, label))
        axis.set(title=task, xlabel=x_label, ylabel="loss of steps (nats)")
        axis.grid(alpha=0.3)
    for place in range(len(panels), rows * columns):
        axes[place // columns][place % columns].axis("off")
    lines = {label: line for row in axes for axis in row for line, label in zip(*_legend(axis), strict=True)}
    shown = [label for label in order if label in lines]
    figure.legend([lines[label] for label in shown], shown, loc="outside right upper", fontsize=7, frameon=False)
    return _saved(figure, target)


def _legend(axis: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    return list(handles), [str(label) for label in labels]


def draw_ranks(target: Path, field: Field) -> Path:
    """Average rank of each method with its interval, the best on top; written whole."""
    labels, losses = field.everywhere, field.losses
    ranks, intervals = average_ranks(losses), rank_intervals(losses)
    order = sorted(range(len(labels)), key=lambda place: -ranks[place])
    figure, ((axis,),) = _canvas(1, 1, (7, 1.2 + 0.25 * len(labels)))
    for height, place in enumerate(order):
        low, high = intervals[place]
        axis.plot([low, high], [height, height], color="0.6", linewidth=3, solid_capstyle="round")
        axis.plot([ranks[place]], [height], "o", color="C0", markersize=5)
    axis.set_yticks(range(len(order)), [labels[place] for place in order], fontsize=8)
    axis.set(xlabel=f"average rank over {len(losses)} cells, with 95 % interval; 1 is the lowest training loss")
    axis.grid(axis="x", alpha=0.3)
    return _saved(figure, target)


def draw_memory(target: Path, field: Field) -> Path:
    """Least peak of each method, as bars; written whole."""
    peaks = {label: least_peak(field, label) for label in field.ordered[::-1]}
    known = {label: peak / MEBIBYTE for label, peak in peaks.items() if peak is not None}
    figure, ((axis,),) = _canvas(1, 1, (7, 1.2 + 0.25 * max(1, len(known))))
    axis.barh(range(len(known)), list(known.values()), color="C0")
    axis.set_yticks(range(len(known)), list(known), fontsize=8)
    axis.set(xlabel="peak memory while training (MiB), least over the runs")
    return _saved(figure, target)


def _canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _saved(figure: Any, target: Path) -> Path:
    from matplotlib import pyplot

    try:
        return write_whole(target, lambda path: figure.savefig(path, dpi=110, format="png"))
    finally:
        pyplot.close(figure)
