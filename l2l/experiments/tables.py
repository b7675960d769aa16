"""Tables and figures of an experiment, and its runs as CSV and Parquet.

Tables are made once and written as Markdown, as HTML and in the terminal. Figures are PNG files: average ranks, wins, loss
against passes and against seconds, memory.
"""

import csv
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from l2l.experiments import stats
from l2l.experiments.runner import Chosen
from l2l.experiments.spec import MethodCosts
from l2l.experiments.stats import Cell, Curve, Point, RunTable, at_edge, point_size, rank_intervals, ranks_by_label, wins
from l2l.report import page
from l2l.report.console import print_table, spread
from l2l.report.page import Listing, Picture, Section, Table, Text
from l2l.report.run_directory import clock, environment, write_whole

MEBIBYTE = 2**20


def point_text(point: Point) -> str:
    """A point in words: ``lr 0.0001``, ``step_fraction 0.1``, ``cosine lr 0.0003``."""
    more = [str(value) for name, value in point.items() if name not in ("lr", "step_fraction")]
    return " ".join([*more, "step_fraction" if point["lr"] == "auto" else "lr", f"{point_size(point):g}"])


STANDING_NOTE = (
    "Rank 1 is the lowest final training loss, by the mean over the seeds; the rank is averaged over all cells (model, scheme, "
    "task), and given to methods that ran in all of them. The interval is over draws of cells and of seeds within them. A win "
    "is a cell in which the mean is lower. A diverged run counts as an infinite loss."
)


def standings(runs: RunTable, baseline: str) -> list[Table]:
    """:func:`standing` over all cells, and where there are several models or schemes, within each."""
    inside = runs.places if len(runs.places) > 1 else {}
    return [standing(runs, baseline), *(standing(part, baseline, name) for name, part in inside.items())]


def standing(runs: RunTable, baseline: str, title: str = "All cells") -> Table:
    """Rank, wins and cost of each method over the cells of a table."""
    everywhere, total = runs.everywhere, len(runs.cells)
    ranks, intervals, won = ranks_by_label(runs), {}, {}
    if everywhere:
        intervals = dict(zip(everywhere, rank_intervals(runs.losses), strict=True))
        if baseline in everywhere:
            counts = wins(runs.losses)[:, everywhere.index(baseline)]
            won = {label: n for label, n in zip(everywhere, counts, strict=True) if label != baseline}
    rows = []
    for label in runs.ordered:
        own = runs.all_of(label)
        ok = [run for run in own if run.status == "ok"]
        rank = Text(f"{ranks[label]:.2f}", ranks[label] == min(ranks.values())) if label in ranks else Text("-")
        texts = [
            "{:.2f} to {:.2f}".format(*intervals[label]) if label in intervals else "-",
            f"{won[label]} of {total}" if label in won else "-",
            f"{len({run.cell for run in own})} of {total}",
            str(sum(run.diverged for run in own)),
            f"{fmean(run.passes for run in ok):.0f}" if ok else "-",
            f"{fmean(run.seconds for run in ok):.1f}" if ok else "-",
        ]
        rows.append([Text(label), rank, *map(Text, texts)])
    head = ["method", "average rank", "95 % interval", f"wins over {baseline}", "cells", "diverged"]
    return Table(title, [*head, "passes per run", "seconds per run"], rows, STANDING_NOTE)


def figures(runs: RunTable, quantity: str, title: str, lowest: bool) -> list[Table]:
    """A table per setting and scheme: methods by tasks, mean ± standard deviation over the seeds, the best in bold."""
    found = []
    for name, part in runs.places.items():
        rows = [[Text(label)] for label in part.ordered]
        for cell in part.cells:
            every = {label: part.runs.get((cell, label), ()) for label in part.ordered}
            ended = {label: own for label, own in every.items() if not all(run.diverged for run in own)}
            means = {label: fmean(getattr(run, quantity) for run in own) for label, own in ended.items()}
            top = (min if lowest else max)(means.values(), default=None)
            for row, (label, own) in zip(rows, every.items(), strict=True):
                ok = [getattr(run, quantity) for run in own if not run.diverged]
                failed = f" ({len(own) - len(ok)} of {len(own)} diverged)" if len(ok) < len(own) else ""
                text = spread(ok) + failed if ok else "diverged" if own else "-"
                row.append(Text(text, label in means and means[label] == top and isfinite(means[label])))
        found.append(Table(f"{name}: {title}", ["method", *(cell.task for cell in part.cells)], rows))
    return found


MEMORY_NOTE = (
    "Peak: the most memory in use while a run trained, the least over its runs; on the CPU that of the whole process, in "
    "which libraries, model and activations outweigh what a method keeps of a small model. Copies: for the first model and "
    "scheme under which the method takes part."
)


def memory(runs: RunTable, costs: Mapping[str, MethodCosts]) -> Table:
    """Memory of each method: what it declares, and the measured peak."""
    rows = []
    for label in runs.ordered:
        own = costs.get(label, MethodCosts())
        copies = "-" if own.kept_bytes is None or not own.trained_bytes else f"{own.kept_bytes / own.trained_bytes:.2f}"
        peaks = [least_peak(part, label) for part in runs.places.values()]
        texts = ["-" if peak is None else f"{peak / MEBIBYTE:.0f}" for peak in peaks]
        rows.append([Text(text) for text in (label, own.memory or "-", copies, *texts)])
    head = ["method", "keeps (declared)", "kept, in copies of what is trained"]
    return Table("Memory", [*head, *(f"peak MiB, {name}" for name in runs.places)], rows, MEMORY_NOTE)


def least_peak(runs: RunTable, label: str) -> int | None:
    """The least peak of a method's runs: a process that did other runs before holds more."""
    return min((run.peak_bytes for run in runs.all_of(label) if run.peak_bytes is not None), default=None)


def step_sizes(runs: RunTable, chosen: Chosen) -> Table:
    """The step size that each method was run with."""
    rows = []
    for label in runs.ordered:
        texts = []
        for cell in runs.cells:
            point, grid = chosen.get((cell, label), (None, ()))
            texts.append("-" if point is None else point_text(point) + (" *" if at_edge(point, grid) else ""))
        rows.append([Text(text) for text in (label, *texts)])
    note = "*: at the end of its grid; a better one may lie beyond."
    return Table("Step sizes chosen", ["method", *(" ".join(cell) for cell in runs.cells)], rows, note)


def print_tables(tables: Sequence[Table]) -> None:
    """Tables in the terminal."""
    for table in tables:
        rows = [dict(zip(table.columns, (text.text for text in row), strict=True)) for row in table.rows]
        print_table(table.title, rows)


def markdown(title: str, paragraphs: Sequence[str], tables: Sequence[Table]) -> str:
    """A page: title, paragraphs, tables."""
    parts = [f"# {_escaped(title)}", *map(_escaped, paragraphs)]
    for table in tables:
        parts += [f"## {_escaped(table.title)}", markdown_table(table), *([_escaped(table.note)] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table; the best of a column in bold."""
    lines = [
        [_escaped(name) for name in table.columns],
        ["---", *["--:"] * (len(table.columns) - 1)],
        *([f"**{_escaped(text.text)}**" if text.best else _escaped(text.text) for text in row] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: str) -> str:
    """Text that cannot end a table's field or become markup."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in ("\\", "|", "*", "`"):
        plain = plain.replace(mark, f"\\{mark}")
    return plain


def write_page(
    target: Path, title: str, paragraphs: list[str], tables: list[Table], pictures: dict[str, Path], config: dict[str, Any]
) -> None:
    """Write tables and figures as a page, with the configuration, versions and hardware at its end."""
    listings = {"Configuration": config, "Versions and hardware": environment()}
    texts = [Listing(name, yaml.safe_dump(value, sort_keys=False)) for name, value in listings.items()]
    figures = [Picture(name, path) for name, path in pictures.items()]
    sections = [Section("Tables", tables), Section("Figures", figures), Section("How it was run", texts)]
    page.write(target, title, paragraphs, [section for section in sections if section.parts])


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """``results.csv`` and ``results.parquet``, a row per record; Parquet only where ``pyarrow`` is installed."""

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)

    written = [write_whole(folder / "results.csv", write_csv)]
    try:
        parquet, arrow = import_module("pyarrow.parquet"), import_module("pyarrow")
    except ImportError:
        return written
    rows = arrow.Table.from_pylist([dict(record) for record in records])
    return [*written, write_whole(folder / "results.parquet", lambda path: parquet.write_table(rows, path))]


def finite(value: Any) -> Any:
    """Nested values as strict JSON has them: None in place of infinities and of what is not a number."""
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


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


def draw_curves(
    target: Path,
    panels: Mapping[str, dict[str, Curve]],
    order: Sequence[str],
    x_label: str | Sequence[str],
    y_label: str = "loss of steps (nats)",
) -> Path:
    """A panel per task, a line per method in the same colour and style everywhere, one legend.

    Args:
        x_label: of all panels, or of each.
    """
    labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    figure, axes = _canvas(rows, columns, (5 * columns + 2.5, max(3.6 * rows, 0.19 * len(order) + 0.5)))
    styles = {label: (f"C{n % 10}", ("-", "--", ":", "-.")[n // 10 % 4]) for n, label in enumerate(sorted(order))}
    lines: dict[str, Any] = {}
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (task, curves), below in zip(axes.flat, panels.items(), labels, strict=False):
        for label, curve in curves.items():
            color, style = styles[label]
            x, y = zip(*curve, strict=True) if curve else ((), ())
            (lines[label],) = axis.plot(x, y, linewidth=1.2, color=color, linestyle=style)
        axis.set(title=task, xlabel=below, ylabel=y_label)
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
