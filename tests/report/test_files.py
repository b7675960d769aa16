"""Files that are either complete or not there."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

from l2l.report.run_directory import read_tensors, write_json, write_tensors, write_whole, write_yaml


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def half(path):
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, half)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_a_writer_that_fails_at_first_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "new.json", {"value": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_and_missing_folders_are_made(tmp_path):
    target = tmp_path / "a" / "b" / "file.json"
    write_json(target, {"x": 1})
    assert write_json(target, {"x": 2, "y": math.nan}) == target
    found = json.loads(target.read_text())
    assert found["x"] == 2
    assert math.isnan(found["y"])
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


def test_yaml_keeps_the_order_and_the_header(tmp_path):
    text = write_yaml(tmp_path / "c.yaml", {"z": 1, "a": [1.5, None]}, "# a header\n").read_text()
    assert text.startswith("# a header\nz: 1\n")
    assert yaml.safe_load(text) == {"z": 1, "a": [1.5, None]}


def test_tensors_come_back_bit_for_bit(tmp_path):
    value = {"a": torch.randn(5), "nested": [{"b": torch.arange(3)}, 7, "word", None]}
    found = read_tensors(write_tensors(tmp_path / "t.pt", value))
    assert torch.equal(found["a"], value["a"])
    assert torch.equal(found["nested"][0]["b"], torch.arange(3))
    assert found["nested"][1:] == [7, "word", None]


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04" + b"0" * 300])
def test_a_file_that_holds_no_tensors_is_refused_with_the_way_out(content, tmp_path):
    (tmp_path / "t.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.pt is not readable \(.*\): remove it to start over"):
        read_tensors(tmp_path / "t.pt")


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    target = write_tensors(tmp_path / "t.pt", torch.zeros(1000))
    target.write_bytes(target.read_bytes()[:2000])
    with pytest.raises(ValueError, match="is not readable"):
        read_tensors(target)
    with pytest.raises(ValueError, match="no such file"):
        read_tensors(tmp_path / "absent.pt")
