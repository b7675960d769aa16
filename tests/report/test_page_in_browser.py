"""The page in headless Chromium, where one is installed: no console error, no request, no sideways scrolling, keys suffice."""

from __future__ import annotations

import base64
from pathlib import Path

import browser
import pytest

from l2l.report.page import Bars, Heat, Lines, Listing, Picture, Section, Table, Text, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.chromium() is None, reason="no Chromium is installed (Debian: chromium-headless-shell)"),
]

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with every part, long names and wide tables."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "a.png").write_bytes(base64.b64decode(PIXEL))
    long = "a_name_without_any_place_to_break_it_" * 4
    layers, kinds = [str(n) for n in range(32)], [long, "mlp", "norm"]
    parts = [
        Table("table", [long, *layers], [[Text(long), *(Text(f"{n}.123456") for n in range(32))]]),
        Table("examples", ["prompt", "right"], [[Text("some words " * 80), Text(long)]], long=True),
        Lines("curves", {f"{long}{n}": [(float(x), x * n + 1.0) for x in range(500)] for n in range(10)}, "x", "y"),
        Heat("heat", kinds, layers, [[n + 1.0 for n in range(32)]] * 3, "kind", "layer"),
        Bars("bars", {long: 1.0, "b": 2.0}, "MiB"),
        Picture("picture", folder / "a.png"),
        Listing("command", f"l2l fine-tune --model {long * 3}"),
        Listing("configuration", f"out: {long * 3}", folded=True),
    ]
    return write(folder / "page.html", long, [long], [Section("first", parts), Section(long, parts[:1])])


@pytest.fixture(scope="module")
def chrome():
    with browser.Browser() as found:
        yield found


@pytest.mark.parametrize("view", browser.VIEWS)
def test_it_opens_from_a_file_without_errors_requests_or_sideways_scrolling(chrome, page, view):
    width, height, dark = browser.VIEWS[view]
    chrome.open(page, width, height, dark, touch=view == "phone")
    assert chrome.value("document.documentElement.scrollWidth") == width
    assert chrome.errors == []
    assert [url for url in chrome.requests if not url.startswith(("file:", "data:"))] == []
    light = "rgb(255, 255, 255)"
    assert (chrome.value("getComputedStyle(document.body).backgroundColor") == light) is not dark
    # texts of a chart are as large as on paper, whatever the window
    drawn, box = (
        "document.querySelector('svg').getBoundingClientRect().width",
        "document.querySelector('svg').viewBox.baseVal.width",
    )
    assert 11 * chrome.value(drawn) / chrome.value(box) >= 10


def test_a_network_request_and_a_console_error_would_be_seen(chrome, tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('broken')</script><img src='http://127.0.0.1:9/a.png'>")
    before = len(chrome.errors)
    chrome.open(tmp_path / "bad.html")
    assert "http://127.0.0.1:9/a.png" in chrome.requests
    assert any("broken" in line for line in chrome.errors[before:])
    del chrome.errors[before:]
    chrome.requests.clear()


def test_keys_reach_links_tables_and_what_is_folded(chrome, page):
    chrome.open(page)
    seen: list[str] = []
    for _ in range(40):
        chrome.press("Tab")
        seen.append(
            chrome.value("document.activeElement.tagName + ' ' + (document.activeElement.getAttribute('aria-label') || '')")
        )
        if seen[-1].startswith("SUMMARY"):
            break
    assert seen[:2] == ["A ", "A "]
    assert "DIV table" in seen
    assert seen[-1].startswith("SUMMARY")
    assert not chrome.value("document.activeElement.parentElement.open")
    chrome.press("Enter")
    assert chrome.value("document.activeElement.parentElement.open")
    outline = chrome.value("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
