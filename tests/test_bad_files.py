"""Kind 9 of issue 16, *only some exceptions count as bad input*: files, folders and devices that cannot be used are one line
and exit code 2 in every command that takes them, and nothing is written."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from daily import daily_slice

from l2l import cli
from l2l.cli import COMMANDS, main

pytestmark = pytest.mark.in_turn

SIZES = "--steps 1 --batch_size 2 --train_size 4 --dev_size 2 --test_size 2 --lr 1e-3 --prefix_cache off --progress false"
TINY = SIZES.split()
LONG = "a" * 300
WITH_OUT = [*("quickstart", "meta-train", "fine-tune", "lr-probe", "meta-evaluate", "compare", "plan", "evaluate", "bench")]
BAD_OUT = ("file", "file/below", "nowhere", "circle", LONG)
WITH_OUT += ["estimate", "doctor", "replay", "tuners test", "tuners import", "tuners download", "init", "report", "simulate"]


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """Files and folders that are not what they are taken for; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "tuner/config.json", "tuner/tuner.safetensors", "task.yaml", "data/sst2/train.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("x\n")
    (tmp_path / "table.csv").write_text("text,mood\n" + "lily ran home .,happy\nben fell down .,sad\n" * 9)
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("x = 1\nraise RuntimeError('boom')\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return tmp_path


@pytest.fixture
def line(there, capsys) -> Callable[..., str]:
    """Runs a command that must be refused; the one line it says. Nothing has been written."""

    def run(*arguments: str) -> str:
        before = sorted(there.rglob("*"))
        assert main(arguments) == 2
        assert [path for path in sorted(there.rglob("*")) if "__pycache__" not in path.parts] == before
        (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("l2l: ")]
        assert len(said) > len("l2l: ")
        return said

    return run


def needed(command: str) -> list[str]:
    """Arguments that a command cannot do without."""
    given = {"tuners test": ["l2l-tiny"], "plan": ["--tuner", "l2l-tiny"], "tuners download": ["l2l-tiny"], "replay": ["run"]}
    given |= {"init": ["table.csv"], "report": ["run"]}
    given["tuners import"] = ["file", "--base_model", "facebook/opt-125m"]
    return [*command.split(), *given.get(command, [])]


@pytest.mark.parametrize(("command", "out"), daily_slice(product(WITH_OUT, BAD_OUT), 12))
def test_an_out_that_cannot_be_a_directory_is_refused_before_anything_is_loaded(command, out, line, monkeypatch):
    monkeypatch.setattr("l2l.models.load._load", lambda *_, **__: pytest.fail("loaded"))
    if command == "tuners download":
        pytest.skip("would have to reach the hub")
    line(*needed(command), "--out", out)


def test_every_command_with_an_out_is_tried():
    found = [path for path, command in COMMANDS.items() if command.config and has_out(command)]
    assert set(found) <= set(WITH_OUT)


def has_out(command: cli.Command) -> bool:
    import dataclasses

    return "out" in {field.name for field in dataclasses.fields(cli._imported(command, command.config))}


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "xpu", "junk:3", "meta"])
@pytest.mark.parametrize("command", ["fine-tune", "evaluate", "meta-train", "lr-probe", "bench", "estimate"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(command, device, line):
    said = line(*needed(command), "--device", device)
    assert repr(device) in said
    assert "cpu" in said.lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_map_that_is_not_there_is_named(line):
    assert "'cuda'" in line("fine-tune", *TINY, "--device_map", "cuda")


@pytest.mark.parametrize(("file", "said"), [
    ("./none.py", "there is no file"),
    ("syntax.py", "cannot be imported: SyntaxError: invalid syntax (syntax.py, line 1)"),
    ("raises.py", "cannot be imported: RuntimeError: boom at "),
    ("empty.py", "defines 0 methods"),
    ("folder", "unknown method 'folder'"),
    (".", "cannot be imported"),
    ("a..b", "can be imported"),
])  # fmt: skip
def test_a_method_that_is_no_method_is_named(file, said, line):
    assert said in line("fine-tune", *TINY, "--method", file)


@pytest.mark.parametrize(("name", "said"), [
    ("./none.py:f", "there is no file"),
    ("syntax.py:f", "SyntaxError"),
    ("./raises.py:f", "RuntimeError: boom"),
    ("empty.py:f", "has no function 'f'"),
    (":f", "cannot be imported"),
])  # fmt: skip
def test_an_objective_that_is_none_is_named(name, said, line):
    assert said in line("fine-tune", *TINY, "--objective", name)


@pytest.mark.parametrize("option", ["--objective", "--architecture"])
def test_code_of_meta_training_that_raises_is_named(option, line, there, monkeypatch):
    monkeypatch.syspath_prepend(str(there))
    (there / "pack").mkdir()
    (there / "pack" / "raising.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in line("meta-train", option, "pack.raising")


@pytest.mark.parametrize("arguments", [
    ["fine-tune", "--model", "file"], ["fine-tune", "--model", "folder"], ["fine-tune", "--model", f"/{LONG}"],
    ["fine-tune", "--task", "task.yaml"], ["fine-tune", "--task", "binary.yaml"], ["fine-tune", "--task", f"{LONG}.yaml"],
    ["fine-tune", "--task", "sst2", "--data_dir", "data"], ["fine-tune", "--task", "sst2", "--data_dir", "file"],
    ["fine-tune", "--tuner", "tuner"], ["fine-tune", "--tuner", "file"], ["fine-tune", "--tuner", f"/{LONG}"],
    ["fine-tune", "--config", "folder"], ["fine-tune", "--config", "none.yaml"], ["fine-tune", "--config", "binary.yaml"],
    ["quickstart", "--tuner", "tuner"], ["plan", "--tuner", "tuner"], ["compare", "--runs", "file"],
    ["tuners", "show", "tuner"], ["tuners", "show", f"/{LONG}"], ["tuners", "verify", "tuner"], ["tuners", "card", "tuner"],
    ["tuners", "diff", "tuner", "file"], ["tuners", "test", "tuner"], ["tuners", "push", "tuner", "a/b"],
    ["tuners", "import", "folder", "--base_model", "facebook/opt-125m", "--out", "x"],
    ["tasks", "show", "task.yaml"], ["tasks", "check", "task.yaml"], ["tasks", "check", "sst2", "--data_dir", "data"],
], ids=" ".join)  # fmt: skip
def test_inputs_that_are_not_what_they_are_taken_for(arguments, line):
    if "compare" in arguments:
        pytest.skip("builds every method first: see test_compare_config.py")
    line(*arguments)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "x"), PermissionError(errno.EACCES, "Permission denied", "x"),
    OSError(errno.EROFS, "Read-only file system", "x"), IsADirectoryError(errno.EISDIR, "Is a directory", "x"),
    OSError(errno.ENAMETOOLONG, "File name too long", "x"), OSError(errno.ESTALE, "Stale file handle"), BlockingIOError("busy"),
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("[..] DefaultCPUAllocator: can't allocate"),
], ids=repr)  # fmt: skip
def test_every_error_of_files_devices_and_memory_is_one_line_with_what_was_added_to_it(error, monkeypatch, capsys):
    error.__notes__ = ["and a way out"]

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("l2l.tasks.inspect.list_tasks", broken)
    assert main(["tasks", "list"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("l2l: ") and said.endswith("and a way out") and "[Errno" not in said
    assert (getattr(error, "strerror", None) or str(error) or "MemoryError") in said


def test_any_other_error_is_a_defect_and_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("l2l.tasks.inspect.list_tasks", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["tasks", "list"])


def test_a_reader_that_has_enough_is_no_error():
    import subprocess

    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    code = f"{sys.executable} -m l2l tasks list | true; test ${{PIPESTATUS[0]}} -ne 1"
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" not in found.stderr
