"""Figures of an experiment: average ranks, wins, loss against passes and against seconds, memory. PNG, written whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2l.experiments import stats
from l2l.experiments.stats import Cell, Curve, RunTable
from l2l.experiments.tables import MEBIBYTE, least_peak
from l2l.report.run_directory import METRICS, read_metrics, write_whole

COLUMNS = 3  # most panels beside each other


def draw_all(folder: Path, runs: RunTable) -> dict[str, Path]:
    """Every figure of a comparison, by caption."""
    found: dict[str, Path] = {}
    if runs.everywhere:
        order = stats.by_rank(runs.everywhere, runs.losses)
        places = [runs.everywhere.index(label) for label in order]
        shares = np.array(stats.win_shares(runs.losses))[np.ix_(places, places)].tolist()
        found["Average rank over all cells"] = draw_ranks(folder / "ranks.png", runs)
        found["Share of cells won"] = draw_matrix(folder / "wins.png", order, shares)
    for name, part in runs.places.items():
        words = "-".join(part.cells[0][:2])
        if len(runs.places) > 1 and part.everywhere:
            found[f"{name}: average rank"] = draw_ranks(folder / f"ranks-{words}.png", part)
        curves = {cell.task: mean_curves(part, cell) for cell in part.cells}
        for axis, label in (("passes", "forward passes"), ("seconds", "seconds of training")):
            panels = {task: both[axis] for task, both in curves.items()}
            target = folder / f"loss-{axis}-{words}.png"
            found[f"{name}: loss against {label}"] = draw_curves(target, panels, part.ordered, label)
        found[f"{name}: memory"] = draw_memory(folder / f"memory-{words}.png", part)
    return found


def mean_curves(runs: RunTable, cell: Cell) -> dict[str, dict[str, Curve]]:
    """``passes`` and ``seconds`` (mean) -> method -> smoothed loss of its steps, over the seeds that did not diverge."""
    passes: dict[str, Curve] = {}
    seconds: dict[str, Curve] = {}
    for label in runs.labels:
        ok = [run for run in runs.runs.get((cell, label), ()) if run.status == "ok"]
        points = [point for run in ok for point in stats.smoothed(run.curve, stats.WINDOW_SHARE * run.passes)]
        if points:
            passes[label] = curve = stats.mean_by_x(points)
            x, losses = zip(*curve, strict=True)
            clocks = [np.array(clock(Path(run.folder))).T for run in ok]
            spent = np.mean([np.interp(x, *times) for times in clocks], axis=0)
            seconds[label] = list(zip(spent.tolist(), losses, strict=True))
    return {"passes": passes, "seconds": seconds}


def clock(folder: Path) -> Curve:
    """(passes spent, seconds of training by then) of a run, from 0 to its end."""
    return [(0.0, 0.0), *((float(row["passes"]), float(row["seconds"])) for row in read_metrics(folder / METRICS))]


def draw_curves(
    target: Path,
    panels: Mapping[str, dict[str, Curve]],
    order: Sequence[str],
    x_label: str,
    y_label: str = "loss of steps (nats)",
) -> Path:
    """A panel per task, a line per method in the same colour and style everywhere, one legend."""
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    figure, axes = _canvas(rows, columns, (5 * columns + 2.5, max(3.6 * rows, 0.19 * len(order) + 0.5)))
    styles = {label: (f"C{n % 10}", ("-", "--", ":", "-.")[n // 10 % 4]) for n, label in enumerate(sorted(order))}
    lines: dict[str, Any] = {}
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (task, curves) in zip(axes.flat, panels.items(), strict=False):
        for label, curve in curves.items():
            color, style = styles[label]
            x, y = zip(*curve, strict=True) if curve else ((), ())
            (lines[label],) = axis.plot(x, y, linewidth=1.2, color=color, linestyle=style)
        axis.set(title=task, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    shown = [label for label in order if label in lines]
    figure.legend([lines[label] for label in shown], shown, loc="outside right upper", fontsize=7, frameon=False)
    return _save(figure, target)


def draw_ranks(target: Path, runs: RunTable) -> Path:
    """Average rank of each method with its interval, the best on top."""
    labels, losses = runs.everywhere, runs.losses
    ranks, intervals = stats.average_ranks(losses), stats.rank_intervals(losses)
    order = sorted(range(len(labels)), key=lambda place: -ranks[place])
    figure, ((axis,),) = _canvas(1, 1, (7, 1.2 + 0.25 * len(labels)))
    for height, place in enumerate(order):
        axis.plot(intervals[place], [height, height], color="0.6", linewidth=3, solid_capstyle="round")
        axis.plot([ranks[place]], [height], "o", color="C0", markersize=5)
    axis.set_yticks(range(len(order)), [labels[place] for place in order], fontsize=8)
    axis.set(xlabel=f"average rank over {len(losses)} cells, with 95 % interval; 1 is the lowest training loss")
    axis.grid(axis="x", alpha=0.3)
    return _save(figure, target)


def draw_matrix(target: Path, labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> Path:
    """Heat map: the share of cells on which the row's contender ends below the column's."""
    size = 3 + 0.55 * len(labels)
    figure, ((axis,),) = _canvas(1, 1, (size + 1, size))
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="RdYlGn")
    axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_title("share of pairs on which the row ends with the lower training loss", fontsize=9)
    for row, shares in enumerate(matrix):
        for column, share in enumerate(shares):
            if row != column:
                axis.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axis, shrink=0.7)
    return _save(figure, target)


def draw_memory(target: Path, runs: RunTable) -> Path:
    """Least peak of each method, as bars."""
    peaks = {label: least_peak(runs, label) for label in runs.ordered[::-1]}
    known = {label: peak / MEBIBYTE for label, peak in peaks.items() if peak is not None}
    figure, ((axis,),) = _canvas(1, 1, (7, 1.2 + 0.25 * max(1, len(known))))
    axis.barh(range(len(known)), list(known.values()), color="C0")
    axis.set_yticks(range(len(known)), list(known), fontsize=8)
    axis.set(xlabel="peak memory while training (MiB), least over the runs")
    return _save(figure, target)


def _canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _save(figure: Any, target: Path) -> Path:
    from matplotlib import pyplot

    try:
        return write_whole(target, lambda path: figure.savefig(path, dpi=110, format="png"))
    finally:
        pyplot.close(figure)
