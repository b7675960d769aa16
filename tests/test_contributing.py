"""CONTRIBUTING.md is true: each recipe's file, put where the recipe says, is found and runs by the recipe's own command.

The files go into a copy of the package, so that the tree stays as it is. All commands run in one process, each after the
other, because importing costs more than they do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.in_turn

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = ("A method", "A wrapper", "A task", "A tuner network", "A meta-objective", "A noise backend")

SMALL = "--train_size 32 --dev_size 8 --batch_size 4 --progress false"
"""Appended to commands that train: the recipes show what matters."""

RUNNER = """
import json, shlex, sys
from l2l.cli import main
from l2l.noise import dispatch
dispatch.BACKENDS["plain"] = "cpu"  # the line that the recipe adds to the table
codes = {}
for line in sys.stdin.read().splitlines():
    codes[line] = main(shlex.split(line)[1:])
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Recipe:
    """A section of CONTRIBUTING: a file and the command that uses it."""

    path: str
    source: str
    command: str


def recipe(title: str) -> Recipe:
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section, f"CONTRIBUTING has no recipe {title!r}"
    file = re.search(r"^`(\S+\.py)`:\n\n```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    command = re.search(r"^```bash\n(l2l .*?)\n```", section[1], re.MULTILINE)
    assert file and command, f"the recipe {title!r} needs a file and a command"
    return Recipe(file[1], file[2], command[1])


def small(command: str) -> str:
    test = " --test_size 8" if "fine-tune" in command else ""
    return f"{command} {SMALL}{test}" if "-t" in command.split()[1] else command


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """All recipes carried out: the directory, the exit code by command, and what was printed."""
    folder = tmp_path_factory.mktemp("contributing")
    shutil.copytree(ROOT / "l2l", folder / "l2l", ignore=shutil.ignore_patterns("__pycache__"))
    recipes = [recipe(title) for title in RECIPES]
    for one in recipes:
        target = folder / one.path
        assert target.parent.is_dir(), f"{one.path}: there is no such package"
        assert not target.exists(), f"{one.path} is in the package: a recipe adds a file"
        target.write_text(one.source)
    days = (("cried", 0), ("found a toy", 1), ("fell", 0), ("won", 1), ("lost a ball", 0), ("sang", 1))
    names = ("tom", "mia", "sue", "ben", "max", "lily")
    rows = [{"text": f"{name} {what} .", "label": label} for name in names for what, label in days]
    (folder / "data" / "moods").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "data" / "moods" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input="\n".join(small(one.command) for one in recipes),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def summary_of(followed: tuple[Path, dict[str, int], str], title: str) -> dict[str, Any]:
    """``summary.json`` of a recipe's run, whose command must have succeeded."""
    folder, codes, printed = followed
    command = recipe(title).command
    assert codes[small(command)] == 0, printed
    out = re.search(r"--out (\S+)", command)
    assert out
    return json.loads((folder / out[1] / "summary.json").read_text())


def test_a_method_is_one_file(followed):
    found = summary_of(followed, "A method")
    assert (found["method"], found["passes"]) == ("bounded", 20)
    assert found["last"]["train"]["loss"] != found["initial_loss"]


def test_a_wrapper_is_one_file_and_does_what_it_says(followed):
    found = summary_of(followed, "A wrapper")
    assert found["method"] == "matrices_only+mezo"
    folder = followed[0]
    moved = _moved(folder / "runs/matrices/model", folder / "l2l/models/tiny")
    assert moved and not any("norm" in name for name in moved)
    assert any("norm" in name for name in _moved(folder / "runs/bounded/model", folder / "l2l/models/tiny"))


def _moved(model: Path, base: Path) -> set[str]:
    """Names of the tensors in which two saved models differ."""
    from safetensors.torch import load_file

    after, before = load_file(model / "model.safetensors"), load_file(base / "model.safetensors")
    return {name for name, value in after.items() if not value.equal(before[name])}


def test_a_task_is_one_file(followed):
    found = summary_of(followed, "A task")
    assert found["task"] == "moods@1"
    assert found["rows"] == {"train": 28, "dev": 8, "test": 8}


def test_a_tuner_network_is_one_file(followed):
    summary_of(followed, "A tuner network")
    saved = json.loads((followed[0] / "runs/log-linear/config.json").read_text())
    assert saved["architecture"] == "log_linear"
    assert (followed[0] / "runs/log-linear/tuner.safetensors").is_file()


def test_a_meta_objective_is_one_file(followed):
    summary_of(followed, "A meta-objective")
    told = yaml.safe_load((followed[0] / "runs/both/config.yaml").read_text())
    assert told["objective"] == "both_batches"


def test_a_noise_backend_is_a_file_and_its_name_in_the_table(followed):
    _, codes, printed = followed
    assert codes["l2l doctor"] == 0
    assert "plain" in printed
    assert recipe("A noise backend").path == "l2l/noise/plain.py"
    assert (ROOT / "l2l/noise/dispatch.py").read_text().count("BACKENDS") > 1


def test_commands_of_make_and_files_that_it_names_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", TEXT)) <= targets
    files = re.findall(r"`((?:tests|benchmarks|docs)/[\w/]+(?:\.py|\.md|/))`", TEXT)
    files += re.findall(r"python ((?:docs|benchmarks)/\S+\.py)", TEXT)
    assert files and [name for name in files if "NAME" not in name and not (ROOT / name).exists()] == []
