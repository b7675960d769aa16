"""Files that are either complete or not there."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from l2l.report.run_directory import read_tensors, share_as_usual, write_json, write_tensors, write_whole, write_yaml


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


NESTED = {
    "weights": {
        "a/b": torch.randn(5, 3),
        "a": {"b": torch.arange(3)},
        "half": torch.randn(4).bfloat16(),
        "0-dim": torch.tensor(2.5),
    },
    "optimizer": {
        0: {"momentum": torch.randn(3, 4).t()},
        "none": None,
        (1, "x"): [True, 7, -0.0, 1e-310, math.inf, "word", ()],
    },
    "rng": [torch.random.get_rng_state(), (3, (2**70, 5), None)],
    "empty": [torch.zeros(0, 3), {}, []],
    "__metadata__": torch.ones(1, dtype=torch.bool),
}


def same(left: Any, right: Any) -> bool:
    """Equal in values, bits and types, however nested."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or left is right) and str(left) == str(right)


def test_nested_tensors_and_plain_values_come_back_exactly(tmp_path):
    assert same(read_tensors(write_tensors(tmp_path / "t.safetensors", NESTED)), NESTED)


def test_any_reader_of_safetensors_finds_the_tensors_under_the_names_of_their_places(tmp_path):
    flat = {"model.weight": torch.randn(2, 3), "bias": torch.randn(3).half()}
    found = load_file(write_tensors(tmp_path / "best.safetensors", flat))
    assert same({name: found[name] for name in flat}, flat)
    assert load_file(write_tensors(tmp_path / "t.safetensors", NESTED))["optimizer/0/momentum"].shape == (4, 3)


def test_a_tensor_in_two_places_is_written_once_and_stays_one(tmp_path):
    shared = torch.zeros(1000)
    target = write_tensors(tmp_path / "t.safetensors", {"a": shared, "b": [shared]})
    assert target.stat().st_size < 5000
    found = read_tensors(target)
    assert found["a"] is found["b"][0]


@pytest.mark.parametrize("value", [{"x": [object()]}, {"x": {1, 2}}, {"x": torch.zeros(2, 2).to_sparse()}])
def test_what_is_no_plain_value_is_refused_with_its_place_and_leaves_the_old_file(value, tmp_path):
    write_tensors(tmp_path / "t.safetensors", {"x": 1})
    with pytest.raises(TypeError, match="at 'x"):
        write_tensors(tmp_path / "t.safetensors", value)
    assert read_tensors(tmp_path / "t.safetensors") == {"x": 1}


def test_every_flipped_bit_and_every_missing_byte_is_detected(tmp_path):
    """Kind B4 of issue 16: nothing in a checkpoint changes unnoticed."""
    good = write_tensors(tmp_path / "t.safetensors", {"w": torch.randn(3), "step": 3}).read_bytes()
    bad = tmp_path / "t.safetensors"
    for place in range(len(good)):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(ValueError, match=r"t\.safetensors is not readable: "):
            read_tensors(bad)
        bad.write_bytes(good[:place])
        with pytest.raises(ValueError, match=r"t\.safetensors is not readable: "):
            read_tensors(bad)
    bad.write_bytes(good + b"x")
    with pytest.raises(ValueError, match=r"it has \d+ bytes of \d+"):
        read_tensors(bad)


def test_a_file_under_the_name_of_another_is_detected(tmp_path):
    write_tensors(tmp_path / "best.safetensors", {"w": torch.zeros(2)}).rename(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"it is a best\.safetensors under another name"):
        read_tensors(tmp_path / "checkpoint.safetensors")


def test_a_file_that_executes_code_when_unpickled_is_refused_and_executes_nothing(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="cut short, or no file of tensors"):
        read_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 100, b"PK\x03\x04" + b"0" * 300, b"\x02" + b"\0" * 7 + b"{}", b"\xff" * 99]
)
def test_a_file_that_holds_no_tensors_is_refused(content, tmp_path):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.safetensors is not readable: "):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="there is no such file"):
        read_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_of_the_umask(umask, tmp_path):
    """Kind A6 of issue 16. safetensors/safetensors#782: a tuned model that nobody but its trainer can serve."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t.safetensors", {})
        save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
        share_as_usual(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
