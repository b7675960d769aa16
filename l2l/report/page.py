"""One HTML page of tables, charts, heat maps and pictures: it opens from a file, asks nothing of a network, and runs no script.

Charts are SVG of a phone's width, so that their texts can be read there; wider screens show several beside each other.
Colours come from the page's style, which has a dark form. Every text is escaped by the template.
"""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeAlias

from l2l.report.run_directory import write_whole

TEMPLATE = Path(__file__).with_name("page.html")
Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (x, y) in order."""

WIDTH, HEIGHT = 360, 210
"""Of a chart, in CSS pixels on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
"""Margins of the area of the curves."""
POINTS = 240
"""Most points of a curve that are drawn: more than two per three pixels cannot be told apart."""
LISTED = 8
"""Rows of the table below a chart."""
COLORS = 8
"""Colours of curves in the page's style; further curves are dashed."""


class Text(NamedTuple):
    """The content of one field of a table."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row."""

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    note: str = ""
    long: bool = False
    """Whether its fields hold sentences, which are broken into lines."""


@dataclass(frozen=True)
class Picture:
    """A PNG file, embedded."""

    kind: ClassVar[str] = "picture"
    title: str
    path: Path
    note: str = ""

    @property
    def data(self) -> str:
        """The file in base64."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Listing:
    """Text as it stands: a command, a configuration."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str
    note: str = ""
    folded: bool = False
    """Whether it is shown only when it is asked for."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0."""

    kind: ClassVar[str] = "bars"
    title: str
    values: Mapping[str, float]
    unit: str
    note: str = ""

    @property
    def rows(self) -> list[tuple[str, float, str]]:
        """Label, percent of the largest, and text of each."""
        most = max(self.values.values(), default=0.0) or 1.0
        return [(name, round(100 * value / most, 1), f"{value:,.4g} {self.unit}") for name, value in self.values.items()]


@dataclass(frozen=True)
class Heat:
    """A grid of positive values, one colour each; the scale is logarithmic where they span more than a factor of 30."""

    kind: ClassVar[str] = "heat"
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """[rows][columns]; None, or what is not finite: nothing is there."""
    row_name: str
    column_name: str
    note: str = ""

    @cached_property
    def known(self) -> list[float]:
        """The values that there are."""
        return [value for row in self.values for value in row if value is not None and math.isfinite(value)]

    @cached_property
    def log(self) -> bool:
        """Whether the scale is logarithmic."""
        positive = [value for value in self.known if value > 0]
        return bool(positive) and max(positive) > 30 * min(positive)

    @property
    def ends(self) -> tuple[str, str]:
        """The least and the largest value, as text; on a logarithmic scale the least above 0."""
        shown = [value for value in self.known if value > 0] if self.log else self.known
        return (number(min(shown)), number(max(shown))) if shown else ("", "")

    @property
    def cells(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Label of each row, with colour and text of its cells; an empty colour: nothing is there."""
        shown = [value for value in self.known if value > 0] if self.log else self.known
        low, high = (self._scaled(end(shown)) if shown else 0.0 for end in (min, max))

        def cell(value: float | None) -> tuple[str, str]:
            if value is None or not math.isfinite(value):
                return "", ""
            share = (self._scaled(value) - low) / (high - low) if high > low else 0.5
            return color(0.0 if self.log and value <= 0 else share), number(value)

        return [(name, [cell(value) for value in row]) for name, row in zip(self.rows, self.values, strict=True)]

    @property
    def shades(self) -> str:
        """The colours of the scale, from the least value to the largest."""
        return ", ".join(color(place / (len(SHADES) - 1)) for place in range(len(SHADES)))

    def _scaled(self, value: float) -> float:
        if not self.log:
            return value
        return math.log(value) if value > 0 else -math.inf


SHADES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From the least to the largest value: as dark to light, so that it is read without colours too (viridis, CC0)."""


def color(share: float) -> str:
    """The CSS colour of a value between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(SHADES) - 1)
    at = min(int(place), len(SHADES) - 2)
    mixed = (round(a + (place - at) * (b - a)) for a, b in zip(SHADES[at], SHADES[at + 1], strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def number(value: float) -> str:
    """A value in at most three digits; thousands as k, M."""
    if value and abs(value) >= 1000:
        power = 2 if abs(value) >= 999_500 else 1
        return f"{value / 1000**power:.3g}{' kM'[power]}" if abs(value) < 1e9 else f"{value:.2g}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Lines:
    """Curves over one axis. The y axis is logarithmic where all values are positive and span more than a factor of 100."""

    kind: ClassVar[str] = "lines"
    title: str
    curves: Mapping[str, Curve]
    x_label: str
    y_label: str
    note: str = ""
    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    box: ClassVar[tuple[int, int, int, int]] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    """Left, top, right and bottom of the area of the curves."""

    @cached_property
    def drawn(self) -> dict[str, list[tuple[float, float]]]:
        """The finite points of each curve that has some, thinned."""
        finite = {name: [p for p in curve if all(map(math.isfinite, p))] for name, curve in self.curves.items()}
        return {name: thinned(curve, POINTS) for name, curve in finite.items() if curve}

    @cached_property
    def log(self) -> bool:
        """Whether the y axis is logarithmic."""
        values = [y for curve in self.drawn.values() for _, y in curve]
        return bool(values) and min(values) > 0 and max(values) > 100 * min(values)

    @cached_property
    def _spans(self) -> tuple[tuple[float, float], tuple[float, float]]:
        points = [(x, self._scaled(y)) for curve in self.drawn.values() for x, y in curve]
        return _span(x for x, _ in points), _span(y for _, y in points)

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is in the chart; y as scaled."""
        (x0, x1), (y0, y1) = self._spans
        left, top, right, bottom = self.box
        return round(left + (x - x0) / (x1 - x0) * (right - left), 1), round(bottom - (y - y0) / (y1 - y0) * (bottom - top), 1)

    @property
    def paths(self) -> list[tuple[str, int, bool, str, tuple[float, float]]]:
        """Of each curve: name, colour, whether it is dashed, the points of its line, and its last point."""
        found = []
        for count, (name, curve) in enumerate(self.drawn.items()):
            places = [self._place(x, self._scaled(y)) for x, y in curve]
            line = " ".join(f"{x:g},{y:g}" for x, y in places)
            found.append((name, count % COLORS, count >= COLORS, line, places[-1]))
        return found

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Place and text of the marks below."""
        return [(self._place(x, 0.0)[0], number(x)) for x in ticks(*self._spans[0])] if self.drawn else []

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Place and text of the marks at the left."""
        if not self.drawn:
            return []
        low, high = self._spans[1]
        marks = ticks(low, high)
        if self.log:
            marks = [float(power) for power in range(math.ceil(low), math.floor(high) + 1)] or marks
            marks = marks[:: max(1, len(marks) // 4)]
        return [(self._place(0.0, y)[1], number(10**y if self.log else y)) for y in marks]

    @property
    def summary(self) -> str:
        """What a reader who does not see the chart is told."""
        ends = (f"{name} from {number(curve[0][1])} to {number(curve[-1][1])}" for name, curve in self.drawn.items())
        return f"{self.title}, {self.y_label} against {self.x_label}: {'; '.join(ends)}"

    @property
    def figures(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """A few points of each curve, as text."""
        texts = {name: [(number(x), number(y)) for x, y in thinned(curve, LISTED)] for name, curve in self.drawn.items()}
        return list(texts.items())


def thinned(curve: Curve, most: int) -> list[tuple[float, float]]:
    """At most so many points of a curve, evenly over their number, its ends among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(place * (len(curve) - 1) / (most - 1))] for place in range(most)]


def _span(values: Iterable[float]) -> tuple[float, float]:
    """The least and the largest, apart where they are equal."""
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most so many round numbers from ``low`` to ``high``, evenly spaced."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    width = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (factor * power) < most)
    first = math.ceil(low / width - 1e-9)
    return [round(place * width, 12) for place in range(first, math.floor(high / width + 1e-9) + 1)]


Part: TypeAlias = Table | Lines | Heat | Bars | Picture | Listing


@dataclass(frozen=True)
class Section:
    """A heading with sentences and parts below it."""

    title: str
    parts: Sequence[Part] = ()
    paragraphs: Sequence[str] = ()


def render(title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> str:
    """The text of a page."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(title=title, paragraphs=paragraphs, sections=sections)


def write(target: Path, title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> Path:
    """Write a page, whole."""
    page = render(title, paragraphs, sections)
    return write_whole(target, lambda path: path.write_text(page, encoding="utf-8"))
