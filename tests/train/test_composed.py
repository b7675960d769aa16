"""Methods by composed names: what goes around what, and whose arguments are whose."""

from __future__ import annotations

import pytest
from cases import TiedLM

import l2l
from l2l.methods.lozo import LOZO
from l2l.methods.registry import build_method, method_name
from l2l.methods.wrappers.learned import LearnedWrapper
from l2l.tuners.api import Tuner


def build(name: str, args: dict, tuner: bool = True):
    model = TiedLM()
    return build_method(name, 1e-2, args, Tuner.for_model(model) if tuner else None, model, steps=7)


def test_a_tuner_goes_around_a_method_with_arguments_by_part():
    made = build("learned+lozo", {"lozo": {"rank": 3}})
    assert isinstance(made, LearnedWrapper)
    assert isinstance(made.inner, LOZO)
    assert (made.inner.rank, made.epsilon, made.inner.epsilon, made.horizon) == (3, 1e-2, 1e-2, 7)
    assert method_name(made) == "learned+lozo"


@pytest.mark.parametrize(
    ("name", "args", "tuner", "message"),
    [
        ("learned+lozo", {}, False, "method 'learned\\+lozo' needs a tuner"),
        ("lozo", {}, True, "method 'lozo' takes no tuner: leave it out, or use method learned\\+lozo"),
        ("mezo", {}, True, "takes no tuner: leave it out, or use method learned$"),
        ("lerned+mezo", {}, True, "'lerned' can be put around no method; .*did you mean 'learned'"),
        ("learned+lzo", {}, True, "unknown method 'lzo'.*did you mean 'lozo'"),
        ("learned+adamw", {}, True, "nothing can be put around it"),
        ("learned+lozo", {"rank": 3}, True, "method_args of 'learned\\+lozo' are given by part"),
        ("learned+lozo", {"lozo": {"rnk": 3}}, True, "method 'lozo' has no argument 'rnk'; it has .*rank"),
        ("learned+lozo", {"learned": {"inner": 3}}, True, "method 'learned' has no argument 'inner'"),
    ],
)
def test_a_composition_that_means_nothing_is_refused_in_words(name: str, args: dict, tuner: bool, message: str):
    with pytest.raises(ValueError, match=message):
        build(name, args, tuner)


@pytest.mark.parametrize(
    ("method", "args"),
    [("forward_grad", {}), ("hybrid+mezo", {}), ("sparse+forward_grad", {}), ("dizo", {"search": "fo"})],
)
def test_an_objective_without_a_derivative_is_refused_before_anything_is_written(method: str, args: dict, tmp_path):
    small = {"train_size": 8, "dev_size": 4, "test_size": 4, "progress": False, "method_args": args}
    with pytest.raises(ValueError, match="needs the gradient of what it minimises"):
        l2l.fine_tune(
            "l2l/tiny",
            "world_topic",
            method,
            objective="accuracy",
            steps=2,
            lr=1e-4,
            out=str(tmp_path / "out"),
            **small,
        )
    assert not (tmp_path / "out").exists()
