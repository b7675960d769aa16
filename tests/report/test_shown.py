"""Tables and pictures."""

from __future__ import annotations

import pytest

from l2l.report.console import plot_panels, print_table, smooth, spread

PNG = b"\x89PNG\r\n\x1a\n"


def test_spread_is_mean_and_standard_deviation_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert spread([0.5]) == "0.500"
    assert spread([12.34], 1) == "12.3"
    assert spread([1.0, 1.0], 1) == "1.0 ± 0.0"
    assert spread([]) == "-"


def test_a_table_shows_every_value_in_full_however_narrow_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    row = {"task": "world_opposite", "method": "learned", "final loss": "0.693 ± 0.001", "forward passes": 2000}
    print_table("a title", [row | {"accuracy": 0.51234567, "seconds": "12.3 ± 0.4", "lr": 1e-4}] * 2)
    said = capsys.readouterr().out
    for word in (*row, "world_opposite", "0.693 ± 0.001", "2000", "0.5123", "12.3 ± 0.4", "0.0001", "a title"):
        assert str(word) in said


def test_a_single_row_is_shown_name_by_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    print_table("a title", [{"task": "world_opposite", "test accuracy": 0.25, "a rather long name": "x" * 20}])
    lines = capsys.readouterr().out.splitlines()
    assert any("test accuracy" in line and "0.25" in line for line in lines)
    assert any("a rather long name" in line and "x" * 20 in line for line in lines)


def test_an_empty_table_is_only_its_title(capsys):
    print_table("nothing here", [])
    assert "nothing here" in capsys.readouterr().out


def test_smoothing_is_the_running_mean_of_the_last_points():
    assert smooth([(0, 1.0), (1, 3.0), (2, 5.0)], window=2) == [(0, 1.0), (1, 2.0), (2, 4.0)]
    assert smooth([]) == []


@pytest.mark.parametrize(
    "panels",
    [
        {"loss": {"train": [(0, 1.0), (1, 0.5)], "dev": [(1, 0.7)]}},
        {"one": {"a": [(0, 1.0)]}, "two": {"a": [], "b": []}},
    ],
)
def test_panels_become_a_picture(panels, tmp_path):
    target = plot_panels(tmp_path / "p.png", panels, "step", "loss")
    assert target.read_bytes()[:8] == PNG
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
