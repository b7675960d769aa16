"""The page: it fetches nothing, escapes every text, and draws what it is given where it belongs."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from l2l.report import page
from l2l.report.page import Bars, Heat, Lines, Listing, Picture, Section, Table, Text, number, render, thinned, ticks


class Sources(HTMLParser):
    """Everything that a page could fetch, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


EVIL = "<script>alert('x')</script> & {{ 1 + 1 }} \" onload=\"x"


def everything(tmp_path) -> str:
    (tmp_path / "a.png").write_bytes(b"picture")
    parts = [
        Table(EVIL, [EVIL], [[Text(EVIL, best=True)]], EVIL),
        Lines(EVIL, {EVIL: [(0.0, 1.0), (1.0, 2.0)]}, EVIL, EVIL, EVIL),
        Heat(EVIL, [EVIL], [EVIL], [[1.0]], EVIL, EVIL, EVIL),
        Bars(EVIL, {EVIL: 1.0}, EVIL, EVIL),
        Picture(EVIL, tmp_path / "a.png", EVIL),
        Listing(EVIL, EVIL, EVIL),
        Listing(EVIL, EVIL, EVIL, folded=True),
    ]
    return render(EVIL, [EVIL], [Section(EVIL, parts, [EVIL])])


def test_the_page_fetches_nothing_and_escapes_every_text(tmp_path):
    text = everything(tmp_path)
    seen = Sources()
    seen.feed(text)
    assert seen.found == ["#s1", "data:image/png;base64,cGljdHVyZQ=="]
    assert not {*seen.tags} & {"script", "link", "iframe"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "<script" not in text
    assert 'onload="' not in text
    assert "{{ 1 + 1 }}" in text  # nothing in a text is a template
    assert seen.tags.count("polyline") == 1


def test_ticks_are_round_evenly_spaced_and_inside():
    assert ticks(0, 40) == [0, 10, 20, 30, 40]
    assert ticks(0.61, 1.62) == [0.75, 1.0, 1.25, 1.5]
    for low, high in ((-3.2e-7, 1e-6), (0.0, 1.0), (17.0, 17.01), (-5e8, 3e9)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 5
        assert all(low - 1e-9 * (high - low) <= tick <= high + 1e-9 * (high - low) for tick in found)


def test_a_chart_puts_the_ends_of_its_curves_on_the_edges_of_its_area():
    chart = Lines("t", {"a": [(0.0, 1.0), (10.0, 3.0)], "b": [(5.0, 2.0)], "empty": [], "bad": [(1.0, math.nan)]}, "x", "y")
    left, top, right, bottom = chart.box
    (_, _, _, line, last), (_, color, dashed, point, _) = chart.paths
    assert line == f"{left},{bottom} {right},{top}"
    assert last == (right, top)
    assert (color, dashed, point) == (1, False, f"{(left + right) / 2:g},{(top + bottom) / 2:g}")
    assert "a from 1 to 3" in chart.summary


def test_values_over_orders_of_magnitude_are_on_a_logarithmic_axis():
    chart = Lines("t", {"a": [(0.0, 1e-4), (1.0, 1e-2), (2.0, 1.0)]}, "x", "y")
    assert chart.log
    assert [text for _, text in chart.y_ticks] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    _, (_, middle), _ = (tuple(map(float, place.split(","))) for place in chart.paths[0][3].split())
    assert middle == pytest.approx((chart.box[1] + chart.box[3]) / 2)
    assert not Lines("t", {"a": [(0.0, 0.0), (1.0, 1e4)]}, "x", "y").log  # 0 has no logarithm


def test_a_curve_of_one_value_and_one_of_thousands_of_points_are_drawn():
    constant = Lines("t", {"a": [(0.0, 2.0), (1.0, 2.0)]}, "x", "y")
    assert {place.split(",")[1] for place in constant.paths[0][3].split()} == {f"{(constant.box[1] + constant.box[3]) / 2:g}"}
    long = [(float(x), float(x)) for x in range(10_001)]
    assert thinned(long, page.POINTS)[0] == long[0]
    assert thinned(long, page.POINTS)[-1] == long[-1]
    assert len(Lines("t", {"a": long}, "x", "y").paths[0][3].split()) == page.POINTS


def test_cells_of_a_heat_map_go_from_dark_to_light_and_what_is_not_there_has_no_colour():
    heat = Heat("t", ["a", "b"], ["0", "1"], [[1.0, 3.0], [2.0, math.nan]], "kind", "layer")
    (_, ((least, text), (largest, _))), (_, ((middle, _), nothing)) = heat.cells
    assert (least, largest) == (page.color(0.0), page.color(1.0)) == ("rgb(68, 1, 84)", "rgb(253, 231, 37)")
    assert middle == page.color(0.5)
    assert (text, nothing) == ("1", ("", ""))
    assert heat.ends == ("1", "3")
    wide = Heat("t", ["a"], ["0", "1", "2", "3"], [[1e-4, 1e-2, 1.0, 0.0]], "kind", "layer")
    assert wide.log
    assert [color for color, _ in wide.cells[0][1]] == [page.color(share) for share in (0.0, 0.5, 1.0, 0.0)]
    assert wide.ends == ("0.0001", "1")
    assert Heat("t", [], [], [], "kind", "layer").cells == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.12345, "0.123"), (999.0, "999"), (1234.0, "1.23k"), (-2.5e6, "-2.5M"), (1e12, "1e+12")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_bars_are_shares_of_the_largest():
    assert Bars("t", {"a": 1.0, "b": 4.0}, "s").rows == [("a", 25.0, "1 s"), ("b", 100.0, "4 s")]
    assert Bars("t", {"a": 0.0}, "s").rows == [("a", 0.0, "0 s")]
