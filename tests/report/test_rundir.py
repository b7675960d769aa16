"""Who may write into a run's directory."""

from __future__ import annotations

import json

import pytest
import yaml

from l2l.report.run_directory import RunDirectory, environment

CONFIG = {"out": "somewhere", "steps": 3, "tasks": ["a", "b"], "tuner": None}


@pytest.mark.parametrize("exists", [True, False])
def test_an_absent_or_empty_directory_is_taken_and_written_to_only_when_created(exists, tmp_path):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    folder = RunDirectory(path, CONFIG)
    assert not folder.resumed
    assert path.exists() == exists
    assert not list(tmp_path.rglob("*.*"))
    assert folder.create() is folder
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG


def test_the_same_configuration_continues_if_there_is_a_checkpoint(tmp_path):
    folder = RunDirectory(tmp_path, CONFIG).create()
    assert not RunDirectory(tmp_path, CONFIG).resumed
    folder.checkpoint.write_bytes(b"state")
    assert RunDirectory(tmp_path, CONFIG).resumed
    assert RunDirectory(tmp_path, {**CONFIG, "tasks": ("a", "b")} | {"tasks": ["a", "b"]}).resumed


def test_another_configuration_is_refused(tmp_path):
    RunDirectory(tmp_path, CONFIG).create()
    with pytest.raises(ValueError, match=r"holds another run: steps: 3 -> 4\. Choose another --out, .*--overwrite true"):
        RunDirectory(tmp_path, {**CONFIG, "steps": 4})


def test_a_finished_run_is_refused_and_has_no_checkpoint(tmp_path):
    folder = RunDirectory(tmp_path, CONFIG).create()
    folder.checkpoint.write_bytes(b"state")
    folder.finish({"loss": 1.5})
    assert not folder.checkpoint.exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss"] == 1.5
    assert summary["environment"]["versions"] == environment()["versions"]
    with pytest.raises(ValueError, match="holds this run, finished"):
        RunDirectory(tmp_path, CONFIG)


def test_overwriting_removes_what_a_run_left_but_not_before_it_begins(tmp_path):
    path = tmp_path / "run"
    RunDirectory(path, CONFIG).create().finish({})
    (path / "model").mkdir()
    folder = RunDirectory(path, {**CONFIG, "steps": 4}, overwrite=True)
    assert (path / "summary.json").exists()
    folder.create()
    folder.release()
    assert [entry.name for entry in path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_files_that_no_run_wrote_are_never_touched(name, overwrite, tmp_path):
    (tmp_path / name).write_text("debug: true\n")
    with pytest.raises(ValueError, match="holds files that no run wrote: choose another --out"):
        RunDirectory(tmp_path, CONFIG, overwrite)
    assert (tmp_path / name).read_text() == "debug: true\n"


@pytest.mark.parametrize("content", [b"", b"a: [", b"\xff\xfe\x00", b"- 1\n"])
def test_a_broken_configuration_is_a_file_that_no_run_wrote(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="no run wrote"):
        RunDirectory(tmp_path, CONFIG)


def test_what_a_killed_process_was_about_to_write_does_not_count_and_is_removed(tmp_path):
    (tmp_path / ".writing-x1").mkdir()
    (tmp_path / ".writing-x1" / "config.yaml").write_text("out: so")
    RunDirectory(tmp_path, CONFIG).create().release()
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a directory"):
        RunDirectory(tmp_path / "file", CONFIG)
