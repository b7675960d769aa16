"""Every method as a torch optimizer of its own name, and the ways to name a method."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path

import pytest
import torch
from cases import TiedLM, same_bits, weights, zeroth_order
from torch import nn

import l2l
from l2l.methods import method_class
from l2l.methods.fzoo import FZOO
from l2l.methods.hizoo import HiZOO
from l2l.methods.registry import build_method, declared_method, method_name
from l2l.methods.tezo import TeZO
from l2l.optim import ZOOptimizer
from l2l.optimizers import optimizer, optimizer_names
from l2l.tuners.api import Tuner

pytestmark = pytest.mark.in_turn


@pytest.mark.parametrize("name", zeroth_order())
def test_it_takes_the_steps_of_the_method_with_one_signature_for_all(name: str):
    public = "ZOFineTuner" if name == "learned" else method_class(name).__name__
    make = getattr(l2l, public)
    model, other = TiedLM(), TiedLM()
    first = [Tuner.for_model(model)] if name == "learned" else []
    made = make(model, *first, 1e-3, 1e-2, 7, weight_decay=0.1, perturb="functional")
    assert isinstance(made, torch.optim.Optimizer)
    method = declared_method(name, {"epsilon": 1e-2}, other)
    plain = ZOOptimizer(other, method, 1e-3, 7, 0.1, perturb="functional")
    for _ in range(2):
        made.step(model)
        plain.step(other)
    assert same_bits(weights(model), weights(other))


def test_the_names_are_listed_and_each_is_one_object():
    assert {"MeZO", "DiZO", "ZOFineTuner", "FZOO", "HiZOO", "LOZOM", "SparseMeZO"} <= set(optimizer_names())
    assert len(optimizer_names()) == len(zeroth_order())
    assert set(optimizer_names()) < set(l2l.__all__) < set(dir(l2l))
    assert l2l.optim.HiZOO is l2l.HiZOO is optimizer("HiZOO")
    for absent in ("fzoo", "AdamW", "SGD", "Learned", "NoMethod"):
        with pytest.raises(AttributeError, match=absent):
            getattr(l2l, absent)


def test_its_signature_and_help_have_the_fields_of_the_method():
    signature = inspect.signature(l2l.FZOO)
    assert list(signature.parameters)[:6] == ["model", "lr", "epsilon", "seed", "weight_decay", "num_directions"]
    assert signature.parameters["num_directions"].default == 8
    assert "Dang et al. 2025" in pydoc.render_doc(l2l.FZOO) and "num_directions: Probes of a step" in l2l.FZOO.__doc__
    with pytest.raises(TypeError, match="speed"):
        l2l.FZOO(TiedLM(), speed=3)


def test_old_names_of_arguments_keep_working():
    with pytest.warns(FutureWarning, match="'draws' is now called 'num_directions'"):
        assert l2l.MeZO(TiedLM(), draws=3).method.num_directions == 3
    with pytest.warns(FutureWarning, match="'update' is now called 'rule'"):
        assert build_method("tezo", 1e-3, {"update": "adam"}, None, TiedLM()) == TeZO(rule="adam")


@pytest.mark.parametrize("method", ["hizoo", HiZOO, HiZOO(0.1, smooth=0.5), l2l.HiZOO])
def test_a_method_is_named_by_its_name_its_class_an_object_or_its_optimizer(method):
    assert method_name(method) == "hizoo"
    made = build_method(method, 0.1, {"smooth": 0.5}, None, TiedLM())
    assert made == HiZOO(0.1, smooth=0.5)


def test_what_names_no_method_is_refused():
    for wrong in (print, TiedLM, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="is not a name, a method, a method class"):
            method_name(wrong)


def test_fine_tuning_takes_a_class(tmp_path: Path):
    sizes = {"train_size": 8, "dev_size": 4, "test_size": 4, "batch_size": 2, "progress": False}
    result = l2l.fine_tune(method=FZOO, steps=1, lr=1e-4, out=str(tmp_path / "run"), **sizes)
    assert (result.summary["method"], result.summary["passes"]) == ("fzoo", 9)
