"""The page on adding a method: its example is a file that takes part everywhere, by being there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import test_contracts as contracts
from cases import METHODS, MethodCase, Problem, TiedLM, farthest, same_bits, weights, zeroth_order
from torch import nn

import l2l
import l2l.methods
from l2l.experiments.spec import plain_methods
from l2l.methods import method_names
from l2l.methods.mezo import MeZO
from l2l.methods.registry import build_method, method_list
from l2l.optim import ZOOptimizer
from l2l.tuners.api import Tuner

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"
CASE = MethodCase("clipped", {})


@pytest.fixture(autouse=True)
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's example, as a file among the methods."""
    source = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert source is not None
    (tmp_path / "clipped.py").write_text(source.group(1))
    monkeypatch.setattr(l2l.methods, "__path__", [*l2l.methods.__path__, str(tmp_path)])
    yield
    sys.modules.pop("l2l.methods.clipped", None)
    if hasattr(l2l.methods, "clipped"):
        delattr(l2l.methods, "clipped")


def made(**args: Any) -> Any:
    return build_method("clipped", 1e-3, args, None, TiedLM())


def run(model: nn.Module, method: Any, steps: int = 10) -> dict[str, Any]:
    optimizer = ZOOptimizer(model, method, 0.01, seed=4)
    for _ in range(steps):
        optimizer.step(model)
    return weights(model)


def test_it_is_known_listed_compared_and_held_to_the_contracts_by_being_there():
    assert "clipped" in method_names()
    row = next(row for row in method_list() if row["method"] == "clipped")
    assert "Clipped" in dir(l2l) and l2l.Clipped(TiedLM(), limit=2.0).method == made(limit=2.0)
    assert row["what"] == "MeZO that bounds the projected gradient."
    assert (row["passes"], row["memory"], row["paper"]) == ("2", "0P", "an example; no paper")
    assert "clipped" in plain_methods()
    assert "clipped" in zeroth_order() and "clipped" not in [case.name for case in METHODS]


def test_it_fulfils_the_contracts(problem: Problem):
    contracts.test_it_descends(CASE, problem)
    contracts.test_two_runs_with_one_seed_are_equal_bit_for_bit_and_another_seed_differs(CASE, problem)
    contracts.test_a_run_saved_half_way_continues_bit_for_bit(CASE, problem)
    contracts.test_it_moves_along_the_directions_it_evaluated(CASE, problem)
    contracts.test_theta_is_back_where_the_step_began_when_the_closure_raises(CASE, problem, KeyboardInterrupt, 2)


@pytest.mark.filterwarnings("ignore:no loss has changed")  # the loss is rounded to bfloat16
def test_it_declares_its_memory_rightly_and_trains_half_precision():
    contracts.test_it_holds_no_more_memory_than_it_declares(CASE)
    contracts.test_half_precision_weights_are_trained(CASE)
    contracts.test_tied_weights_move_once(CASE)


def test_without_a_limit_it_is_mezo_and_with_one_it_is_not():
    mezo = run(TiedLM(), MeZO())
    assert same_bits(run(TiedLM(), made(limit=1e9)), mezo)
    assert not same_bits(run(TiedLM(), made(limit=0.1)), mezo)


def test_a_tuner_goes_under_it_and_its_arguments_are_given_by_part():
    model = TiedLM()
    tuner = Tuner.for_model(model, seed=5)
    free = build_method("learned+clipped", 1e-3, {"clipped": {"limit": 1e9}}, tuner, model)
    other = TiedLM()
    assert farthest(run(model, free), run(other, build_method("learned", 1e-3, {}, tuner, other))) < 1e-6


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"decay=1\.5 must be at least 0 and below 1"):
        made(decay=1.5)
    with pytest.raises(ValueError, match=r"method 'clipped' has no argument 'clip'; it has .*limit"):
        made(clip=2)


def test_methods_that_the_page_names_exist():
    text = PAGE.read_text()
    known = set(method_names())
    named = set(re.findall(r"`(\w+)\.py`", text)) - {"learned"}
    assert named <= known, f"the page names {sorted(named - known)}"
