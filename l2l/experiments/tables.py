"""The tables of a comparison, made once and written as Markdown, HTML and in the terminal.

``compare.md``: the tables of a comparison as a page of Markdown.

``index.html``: the whole comparison on one page that opens offline: figures are in it, and nothing is fetched.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from l2l.experiments.console import named
from l2l.experiments.runner import Cell, Result
from l2l.experiments.stats import Point, at_edge, average_ranks, by_rank, rank_intervals, wins
from l2l.experiments.validation import MethodFacts
from l2l.report.console import spread

MEBIBYTE = 2**20


class Text(NamedTuple):
    """What stands in one field of a table."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table: the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    note: str = ""


@dataclass(frozen=True)
class Field:
    """The runs of the table, by cell and method."""

    cells: Sequence[Cell]
    labels: Sequence[str]
    """Methods, in the order in which they were named."""
    runs: Mapping[tuple[Cell, str], Sequence[Result]]
    """Over the seeds; of what was left out or refused there is none."""

    @staticmethod
    def of(results: Sequence[Result], cells: Sequence[Cell], labels: Sequence[str]) -> Field:
        """The field of all results that are no tuning runs. A method of which one seed was refused is not in that cell."""
        found: dict[tuple[Cell, str], list[Result]] = {}
        for result in results:
            if not result.run.tuning:
                found.setdefault((result.cell, result.label), []).append(result)
        whole = {where: runs for where, runs in found.items() if not any(run.refused for run in runs)}
        return Field(cells, labels, whole)

    @property
    def everywhere(self) -> list[str]:
        """Methods that ran in every cell: those that ranks are about."""
        return [label for label in self.labels if all((cell, label) in self.runs for cell in self.cells)]

    @property
    def losses(self) -> NDArray[np.float64]:
        """[cells, seeds, methods that ran everywhere] of final training loss."""
        return np.array(
            [
                [[result.run.train_loss for result in self.runs[cell, label]] for label in self.everywhere]
                for cell in self.cells
            ],
            dtype=np.float64,
        ).swapaxes(1, 2)

    @property
    def ordered(self) -> list[str]:
        """Methods by average rank; then those that did not run everywhere."""
        first = by_rank(self.everywhere, self.losses) if self.everywhere else []
        return first + [label for label in self.labels if label not in first]

    @property
    def places(self) -> dict[str, Field]:
        """The same within each model and scheme, by their names."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(f"{cell.setting}, {cell.scheme}", []).append(cell)
        return {name: Field(cells, self.labels, self.runs) for name, cells in found.items()}

    def all_of(self, label: str) -> list[Result]:
        """A method's runs in all cells."""
        return [result for cell in self.cells for result in self.runs.get((cell, label), ())]


def standings(field: Field, baseline: str) -> list[Sheet]:
    """:func:`standing` over all cells, and where there are several models or schemes, within each."""
    inside = field.places if len(field.places) > 1 else {}
    return [standing(field, baseline), *(standing(part, baseline, name) for name, part in inside.items())]


def standing(field: Field, baseline: str, title: str = "All cells") -> Sheet:
    """Rank, wins and cost of each method over the cells of a field."""
    everywhere, losses = field.everywhere, field.losses
    ranks = dict(zip(everywhere, average_ranks(losses), strict=True)) if everywhere else {}
    intervals = dict(zip(everywhere, rank_intervals(losses), strict=True)) if everywhere else {}
    counts = wins(losses) if everywhere else np.zeros((0, 0), dtype=np.int64)
    least, total = min(ranks.values(), default=None), len(field.cells)
    rows = []
    for label in field.ordered:
        ok = [result.run for result in field.all_of(label) if result.status == "ok"]
        won = "-"
        if label in everywhere and baseline in everywhere and label != baseline:
            won = f"{counts[everywhere.index(label), everywhere.index(baseline)]} of {total}"
        rank = Text(f"{ranks[label]:.2f}", ranks[label] == least) if label in ranks else Text("-")
        low, high = intervals.get(label, (None, None))
        rows.append(
            [
                Text(label),
                rank,
                Text("-" if low is None else f"{low:.2f} to {high:.2f}"),
                Text(won),
                Text(f"{len({result.cell for result in field.all_of(label)})} of {total}"),
                Text(str(sum(result.run.diverged for result in field.all_of(label)))),
                Text(f"{fmean(run.passes for run in ok):.0f}" if ok else "-"),
                Text(f"{fmean(run.seconds for run in ok):.1f}" if ok else "-"),
            ]
        )
    head = ["method", "average rank", "95 % interval", f"wins over {baseline}"]
    return Sheet(title, [*head, "cells", "diverged", "passes per run", "seconds per run"], rows, STANDING_NOTE)


STANDING_NOTE = (
    "Rank 1 is the lowest final training loss, by the mean over the seeds; the rank is averaged over all cells (model, scheme, "
    "task), and given to methods that ran in all of them. The interval is over draws of cells and of seeds within them. A win "
    "is a cell in which the mean is lower. A diverged run counts as an infinite loss."
)


def figures(field: Field, quantity: str, title: str, lowest: bool) -> list[Sheet]:
    """A table per setting and scheme: methods by tasks, mean ± standard deviation over the seeds, the best in bold."""
    sheets = []
    for name, part in field.places.items():
        best = {cell: best_of(part, cell, quantity, lowest) for cell in part.cells}
        rows = [
            [Text(label), *(Text(_over_seeds(part, cell, label, quantity), label in best[cell]) for cell in part.cells)]
            for label in part.ordered
        ]
        sheets.append(Sheet(f"{name}: {title}", ["method", *(cell.task for cell in part.cells)], rows))
    return sheets


def best_of(field: Field, cell: Cell, quantity: str, lowest: bool) -> list[str]:
    """The methods of the best mean in a cell; where all diverged, none."""
    means = {
        label: fmean(getattr(result.run, quantity) for result in field.runs[cell, label])
        for label in field.labels
        if (cell, label) in field.runs and not all(result.run.diverged for result in field.runs[cell, label])
    }
    if not means:
        return []
    top = min(means.values()) if lowest else max(means.values())
    return [label for label, mean in means.items() if mean == top and isfinite(mean)]


def _over_seeds(field: Field, cell: Cell, label: str, quantity: str) -> str:
    runs = field.runs.get((cell, label), ())
    ok = [getattr(result.run, quantity) for result in runs if not result.run.diverged]
    if not runs:
        return "-"
    lost = len(runs) - len(ok)
    return "diverged" if not ok else spread(ok) + (f" ({lost} of {len(runs)} diverged)" if lost else "")


def memory(field: Field, facts: Mapping[str, MethodFacts]) -> Sheet:
    """Memory of each method: what it says it keeps, and the peak that was seen."""
    rows = []
    for label in field.ordered:
        found, said = [least_peak(part, label) for part in field.places.values()], facts.get(label, MethodFacts())
        kept = said.kept_bytes
        share = "-" if kept is None or not said.trained_bytes else f"{kept / said.trained_bytes:.2f}"
        peaks = [Text("-" if peak is None else f"{peak / MEBIBYTE:.0f}") for peak in found]
        rows.append([Text(label), Text(said.memory or "-"), Text(share), *peaks])
    head = ["method", "keeps, as it says", "kept, in copies of what is trained"]
    return Sheet("Memory", [*head, *(f"peak MiB, {name}" for name in field.places)], rows, MEMORY_NOTE)


MEMORY_NOTE = (
    "Peak: the most memory in use while a run trained, the least over its runs; on the CPU that of the whole process, in "
    "which libraries, model and activations outweigh what a method keeps of a small model. Copies: in the first place in "
    "which the method takes part."
)


def least_peak(field: Field, label: str) -> int | None:
    """The least peak of a method's runs: a process that did other runs before holds more."""
    peaks = [result.peak_bytes for result in field.all_of(label)]
    return min((peak for peak in peaks if peak is not None), default=None)


def step_sizes(field: Field, chosen: Mapping[tuple[Cell, str], tuple[Point, Sequence[float]]]) -> Sheet:
    """The step size that each method was run with."""
    rows = []
    for label in field.ordered:
        texts = []
        for cell in field.cells:
            point, grid = chosen.get((cell, label), (None, ()))
            texts.append(Text("-" if point is None else named(point) + (" *" if at_edge(point, grid) else "")))
        rows.append([Text(label), *texts])
    names = [" ".join(cell) for cell in field.cells]
    return Sheet(
        "Step sizes chosen", ["method", *names], rows, "*: at the end of its grid; a better one may lie beyond."
    )


def markdown(title: str, said: Sequence[str], sheets: Sequence[Sheet]) -> str:
    """The page.

    Args:
        said: paragraphs between title and tables.
    """
    parts = [f"# {_escaped(title)}", *(_escaped(line) for line in said)]
    for sheet in sheets:
        parts += [f"## {_escaped(sheet.title)}", table(sheet), *([_escaped(sheet.note)] if sheet.note else [])]
    return "\n\n".join(parts) + "\n"


def table(sheet: Sheet) -> str:
    """A table; the best of a column in bold."""
    lines = [
        [_escaped(name) for name in sheet.columns],
        ["---", *["--:"] * (len(sheet.columns) - 1)],
        *([_marked(text) for text in row] for row in sheet.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _marked(text: Text) -> str:
    return f"**{_escaped(text.text)}**" if text.best else _escaped(text.text)


def _escaped(text: str) -> str:
    """Text that cannot end a table's field or become markup; what names hold is left as it reads."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in ("\\", "|", "*", "`"):
        plain = plain.replace(mark, f"\\{mark}")
    return plain


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr:hover td { background: #f4f6fa; }
td.best { font-weight: bold; }
.note { color: #555; max-width: 60rem; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in said %}<p class="note">{{ line }}</p>
{% endfor %}
{% for sheet in sheets %}<h2>{{ sheet.title }}</h2>
<div class="wide"><table>
<tr>{% for name in sheet.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr>{% for cell in row %}<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}</td>\
{% endfor %}</tr>
{% endfor %}</table></div>
{% if sheet.note %}<p class="note">{{ sheet.note }}</p>{% endif %}
{% endfor %}
{% for name, data in pictures.items() %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
{% for name, text in listings.items() %}<h2>{{ name }}</h2>
<pre>{{ text }}</pre>
{% endfor %}
</body>
</html>
"""


def page(
    title: str,
    said: Sequence[str],
    sheets: Sequence[Sheet],
    pictures: Mapping[str, Path],
    listings: Mapping[str, str],
) -> str:
    """The page; every text in it is escaped.

    Args:
        said: paragraphs between title and tables.
        pictures: what a PNG file shows -> where it lies.
        listings: heading -> text that is shown as it stands.
    """
    from jinja2 import Environment

    inside = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    template = Environment(autoescape=True, trim_blocks=False).from_string(TEMPLATE)
    return template.render(title=title, said=said, sheets=sheets, pictures=inside, listings=listings)
