"""Methods by composed names: what goes around what, and whose arguments are whose."""

from __future__ import annotations

import pytest
from cases import TiedLM

from l2l.enhancements.learned import Scaled
from l2l.finetune.methods import build_method, method_name
from l2l.methods.lozo import LOZO
from l2l.tuners.tuner import Tuner


def build(name: str, args: dict, tuner: bool = True):
    model = TiedLM()
    return build_method(name, 1e-2, args, Tuner.for_model(model) if tuner else None, model, steps=7)


def test_a_tuner_goes_around_a_method_with_arguments_by_part():
    made = build("learned+lozo", {"lozo": {"rank": 3}})
    assert isinstance(made, Scaled)
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
