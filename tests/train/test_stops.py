"""Kinds 3 and 9 of issue 16 on the way of a run: what stops it loses nothing.

Situations of others: a signal that comes twice while a checkpoint is written (lipixun/tftrainer #7), a second checkpoint right
after a due one (the-database/traiNNer-redux #324), signals that are missed outside of the step (goodfire-ai/spd #741), a quota
that is used up (open-mmlab/mmdetection #12069).
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from l2l.cli import main
from l2l.report import run_directory
from l2l.report.run_directory import RunDirectory, stop_requests, write_tensors
from l2l.train import trainer

pytestmark = pytest.mark.in_turn

AT = 2
"""The step in which something happens."""


def command(out: Path, *more: str) -> list[str]:
    sizes = "--steps 4 --batch_size 2 --train_size 8 --dev_size 2 --test_size 2 --lr 1e-3 --eval_every 4 --log_every 1"
    return ["fine-tune", *sizes.split(), "--progress", "false", "--checkpoint_every", "1", "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out)) == 0
    return (out / "model" / "model.safetensors").read_bytes()


def happening(monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
    """The signals arrive while the loss of step :data:`AT` is computed."""
    at = trainer.Closures.at

    def patched(self, step: int) -> Callable[[], object]:
        closure, left = at(self, step), list(signals) if step == AT else []

        def evaluated() -> object:
            while left:
                signal.raise_signal(left.pop(0))
            return closure()

        return evaluated

    monkeypatch.setattr(trainer.Closures, "at", patched)


def after(out: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes) -> None:
    """No half file is there, and the same command ends with the weights of the uninterrupted run."""
    assert not list(out.glob(f"{run_directory.UNFINISHED}*"))
    assert not (out / run_directory.LOCK).exists()
    monkeypatch.undo()
    assert RunDirectory.recorded(out) is not None
    assert main(command(out)) == 0
    assert (out / "model" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("loop", ["bare", "lightning"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_saves_and_says_how_to_go_on(number, loop, whole, tmp_path, monkeypatch, capsys):
    happening(monkeypatch, number)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(command(tmp_path, "--loop", loop, "--checkpoint_every", "100")) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    said = capsys.readouterr().err
    assert "finishing the step and saving; once more to stop at once" in said
    assert f"l2l: stopped after step {AT + 1}; a checkpoint is in {tmp_path}, and the same command continues" in said
    after(tmp_path, monkeypatch, whole)


@pytest.mark.parametrize("loop", ["bare", "lightning"])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once_and_leaves_the_last_checkpoint(second, loop, whole, tmp_path, monkeypatch, capsys):
    happening(monkeypatch, signal.SIGTERM, second)
    assert main(command(tmp_path, "--loop", loop)) == 130
    assert "l2l: interrupted; the same command continues from the last checkpoint" in capsys.readouterr().err
    after(tmp_path, monkeypatch, whole)


def test_a_signal_in_the_last_step_is_heard_and_a_due_checkpoint_is_written_once(whole, tmp_path, monkeypatch):
    written: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (written.append(Path(target).name), replace(self, target))[1])
    monkeypatch.setattr("test_stops.AT", 3)
    happening(monkeypatch, signal.SIGTERM)
    assert main(command(tmp_path)) == 143
    checkpoints = [name for name in written if name.startswith("checkpoint")]
    assert checkpoints.count("checkpoint.safetensors") == 4
    after(tmp_path, monkeypatch, whole)


def test_where_ctrl_c_is_ignored_as_in_a_background_job_it_still_is_and_sigterm_is_heard(whole, tmp_path, monkeypatch):
    happening(monkeypatch, signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(command(tmp_path)) == 143
        happening(monkeypatch, signal.SIGTERM, signal.SIGTERM)
        monkeypatch.setattr("test_stops.AT", 3)
        assert main(command(tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    after(tmp_path, monkeypatch, whole)


def test_where_somebody_else_handles_signals_and_in_threads_none_is_taken(monkeypatch):
    mine = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGINT)
        with stop_requests() as asked:
            assert signal.getsignal(signal.SIGINT) is handler
            assert asked.number is None and not asked.active
    finally:
        signal.signal(signal.SIGINT, mine)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_in_the_middle_leaves_the_last_checkpoint_and_says_so(number, whole, tmp_path, monkeypatch, capsys):
    replace, done = Path.replace, []

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name.startswith("checkpoint"):
            done.append(target)
            if len(done) > AT:
                raise OSError(number, "cannot", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    assert main(command(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"l2l: {tmp_path}/checkpoint")
    assert line.endswith(f"; the last checkpoint in {tmp_path} is whole: the same command continues from it")
    after(tmp_path, monkeypatch, whole)


def test_a_library_that_cannot_write_is_a_file_error_and_leaves_the_old_file(tmp_path):
    import resource

    import torch

    target = write_tensors(tmp_path / "t", {"a": torch.zeros(3)})
    before, limits = target.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"t cannot be written|too large"):
            write_tensors(target, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]
