"""The import path is the registry of methods."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from l2l.methods import method_class, method_names
from l2l.methods.dizo import DiZO
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO


def test_methods_are_known_by_the_names_of_their_files():
    assert {"mezo", "dizo", "learned"} <= set(method_names())
    assert [method_class(name) for name in ("mezo", "dizo", "learned")] == [MeZO, DiZO, Learned]


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown method 'mzo'; known are .*; did you mean 'mezo'\?"):
        method_class("mzo")


def test_a_method_may_live_in_a_module_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere_package").mkdir()
    source = "from l2l.methods.base import Method\nclass Mine(Method):\n    pass\n"
    (tmp_path / "elsewhere_package" / "mine.py").write_text(source)
    (tmp_path / "elsewhere_package" / "two.py").write_text(source + "class Another(Mine):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert method_class("elsewhere_package.mine").__name__ == "Mine"
    with pytest.raises(ValueError, match=r"'elsewhere_package\.two' defines 2 methods; one file holds one method"):
        method_class("elsewhere_package.two")
    with pytest.raises(ValueError, match=r"no module 'elsewhere_package\.none' can be imported"):
        method_class("elsewhere_package.none")
    sys.modules.pop("elsewhere_package", None)


@pytest.mark.parametrize("num_directions", [0, -1])
def test_draws_must_be_positive(num_directions: int):
    with pytest.raises(ValueError, match=f"num_directions={num_directions} must be a whole number"):
        MeZO(num_directions=num_directions)
