"""Tables of an experiment, made once and written as Markdown, as HTML, in the terminal; and the runs as CSV and Parquet."""

import base64
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from l2l.experiments.runner import Chosen
from l2l.experiments.spec import MethodCosts
from l2l.experiments.stats import Point, RunTable, at_edge, point_size, rank_intervals, ranks_by_label, wins
from l2l.report.console import print_table, spread
from l2l.report.run_directory import environment, write_whole

MEBIBYTE = 2**20
TEMPLATE = Path(__file__).with_name("page.html")


class Text(NamedTuple):
    """The content of one field of a table."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    note: str = ""


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


def html(
    title: str, paragraphs: Sequence[str], tables: Sequence[Table], pictures: Mapping[str, Path], listings: Mapping[str, str]
) -> str:
    """A page that opens offline: figures are embedded, nothing is fetched, and every text is escaped.

    ``pictures``: caption -> PNG file; ``listings``: heading -> preformatted text.
    """
    from jinja2 import Environment

    inside = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    template = Environment(autoescape=True, trim_blocks=False).from_string(TEMPLATE.read_text())
    return template.render(title=title, paragraphs=paragraphs, tables=tables, pictures=inside, listings=listings)


def write_page(
    target: Path, title: str, paragraphs: list[str], tables: list[Table], pictures: dict[str, Path], config: dict[str, Any]
) -> None:
    """Write :func:`html` with the configuration, versions and hardware at its end."""
    listings = {"Configuration": config, "Versions and hardware": environment()}
    texts = {name: yaml.safe_dump(value, sort_keys=False) for name, value in listings.items()}
    page = html(title, paragraphs, tables, pictures, texts)
    write_whole(target, lambda path: path.write_text(page))


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
