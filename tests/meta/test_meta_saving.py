"""Kinds A2 and B4 of issue 16 in meta-training: what can fail at the end is tried before the first step, and what is damaged is
named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_meta_run import TINY, cut_at, outcome

import l2l

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {**TINY, "steps": 5, "checkpoint_every": 2}


def meta_train(out: Path) -> l2l.Tuner:
    return l2l.meta_train(out=str(out), **OPTIONS)


def test_a_tuner_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def unwritable(*_: Any) -> None:
        raise TypeError("Object of type int64 is not JSON serializable")

    monkeypatch.setattr("l2l.tuners.io.to_config", unwritable)
    with pytest.raises(ValueError, match="the tuner could not be saved after training: Object of type int64"):
        meta_train(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"the run takes up to [\d,]+ bytes, and 10,000 are free there"):
        meta_train(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named_and_what_is_left_ends_in_the_same_tuner(tmp_path, caplog):
    meta_train(tmp_path / "whole")
    with cut_at(5):
        meta_train(tmp_path / "cut")
    for name in ("checkpoint", "initial", "measured"):
        path = tmp_path / "cut" / f"{name}.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 4
        path.write_bytes(content)
    meta_train(tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    said = [record.message for record in caplog.records if " is not readable: " in record.message]
    damaged = {message.partition(" is not readable")[0].rpartition("/")[2] for message in said}
    assert (len(said), damaged) == (3, {f"{name}.safetensors" for name in ("checkpoint", "initial", "measured")})
