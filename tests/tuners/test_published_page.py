"""The script behind docs/published-tuners.md tells how far a file's blocks moved, and names its own command."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_published import module

from l2l.tuners.fingerprint import Fingerprint

ROOT = Path(__file__).parent.parent.parent
NAMES = tuple(f"layers.{i}.{part}.weight" for i in range(3) for part in ("q_proj", "v_proj"))
PRINTS = Fingerprint(NAMES, ((2, 2),) * 6)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("published_tuners", ROOT / "benchmarks" / "published_tuners.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two draws, three blocks of each; one block moved."""
    modules: dict[str, Any] = {name: module() for name in NAMES}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in NAMES[1::2]:
            torch.manual_seed(5)
            for parameter in modules[name].parameters():
                parameter.copy_(torch.rand_like(parameter) - 0.5)
        modules[NAMES[3]].get_parameter("2.bias").add_(0.5)
    torch.save(modules, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_the_block_that_moved_stands_first_and_its_role_moved_all(script: Any, file: Path):
    found = script.report(file, {"me/model": PRINTS})
    assert [value > 0 for value in found.moved] == [name == NAMES[3] for name in NAMES]
    text = script.page([found])
    assert f"| `{NAMES[3]}` | " in text.partition("Farthest")[2].splitlines()[4]
    assert "| `layers.#.v_proj.weight` | 3 | 0.0e+00 | " in text
    assert text.count("| 100.0 % |") == 1
    assert "Blocks: 6 in groups of 3." in text
    assert found.found.sha256 in text


def test_a_file_of_no_known_model_is_refused(script: Any, file: Path):
    with pytest.raises(ValueError, match="its 6 blocks are those of none of me/other"):
        script.report(file, {"me/other": Fingerprint(("a",), ((1,),))})


def test_a_directory_without_files_is_refused_in_one_line(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["published_tuners.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"published_tuners: no \.pth file in "):
        script.main()
