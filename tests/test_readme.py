"""The README: its Python runs as printed, each of its commands parses, its links and directories exist.

The Python blocks run one after another in one namespace, in an empty directory, as a reader would paste them. The one
thing that is changed is where models come from: an id of the hub becomes ``l2l/tiny``, and a tuner of that name
``l2l-tiny``, because tests have no network. Numbers of steps are those that the README prints.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from l2l.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODELS = "facebook/opt-125m", "facebook/opt-1.3b", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


LINES = [line for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines() if line.strip()]
"""Commands of the bash blocks; a backslash at a line's end continues it."""
INLINE = [span.replace("\n", " ") for span in re.findall(r"`((?:l2l|make) [^`]+)`", README)]
"""Commands in the text."""
L2L = [line for line in dict.fromkeys([*LINES, *INLINE]) if line.startswith("l2l ")]


def offline(code: str) -> str:
    """The code with ``l2l/tiny`` in place of models of the hub."""
    for model in MODELS:
        code = code.replace(f'"{model}"', '"l2l/tiny"').replace(f'"{model.rpartition("/")[2]}"', '"l2l-tiny"')
    return code


def test_the_python_of_the_readme_runs_as_printed(tmp_path, monkeypatch):
    found = blocks("python")
    assert found, "the README shows no Python"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, code in enumerate(found, start=1):
        exec(compile(offline(code), f"README.md, Python block {number}", "exec"), namespace)
    assert any(tmp_path.iterdir()), "the README's Python leaves nothing behind"


def test_every_line_of_a_shell_block_is_a_command_that_is_checked_here():
    assert [line for line in LINES if line.split()[0] not in ("l2l", "make")] == []


@pytest.mark.parametrize("line", L2L)
def test_a_command_of_the_readme_exists_with_its_flags(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, *arguments = shlex.split(line, comments=True)
    with pytest.raises(SystemExit) as leaving:  # it parses, prints its configuration, and leaves
        main([*arguments, "--print_config"])
    assert leaving.value.code == 0, capsys.readouterr().err


def test_the_commands_that_most_readers_need_are_shown():
    shown = {" ".join(line.split()[1:3]) for line in L2L} | {line.split()[1] for line in L2L}
    unusual = {
        "tuners card",
        "tuners diff",
        "tuners download",
        "tuners push",
        "tuners test",
        "tuners verify",
        "tasks show",
    }
    assert COMMANDS.keys() - unusual - shown == {"quickstart"}  # which make runs


def test_the_targets_of_make_that_the_readme_names_exist():
    named = {line.split()[1] for line in [*LINES, *INLINE] if line.startswith("make ")}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"quickstart", "test"} <= named <= targets


def test_the_links_of_the_readme_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_list_of_directories_is_that_of_the_package():
    section = README.partition("## What is where")[2].partition("\n## ")[0]
    listed = {line.split()[0].rstrip("/") for line in section.splitlines() if "  " in line}
    assert [name for name in listed if not (ROOT / name).exists()] == []
    packages = {f"l2l/{path.parent.name}" for path in (ROOT / "l2l").glob("*/__init__.py")}
    assert packages <= listed
