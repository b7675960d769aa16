"""The commands that tell what a run will cost and what it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from l2l.cli import main


@pytest.mark.parametrize("command", ["bench", "doctor", "estimate"])
def test_they_have_help(command: str, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert "usage: l2l" in capsys.readouterr().out


def test_an_estimate_is_printed_and_an_unknown_shape_refused_in_one_line(capsys):
    assert main(["estimate", "--model", "opt-tiny-shape"]) == 0
    said = capsys.readouterr().out
    assert "peak_bytes" in said
    assert "seconds_per_step" in said
    assert main(["estimate", "--model", "opt-9b-shape"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("l2l: ")
    assert "opt-9b-shape" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("command", ["bench", "doctor", "estimate"])
def test_a_directory_with_foreign_files_is_refused_and_left_alone(command: str, overwrite: str, tmp_path: Path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    model = [] if command == "doctor" else ["--model", "opt-tiny-shape"]
    assert main([command, *model, "--out", str(tmp_path), "--overwrite", overwrite]) == 2
    line = capsys.readouterr().err
    assert "choose another --out" in line
    assert line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
