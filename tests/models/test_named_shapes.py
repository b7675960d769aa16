"""Named shapes have the sizes their names promise."""

from __future__ import annotations

import pytest
import torch

from l2l.models.shapes import SHAPES, shape_config

PARAMETERS = {
    "opt-125m-shape": 0.1252e9,
    "opt-1.3b-shape": 1.316e9,
    "opt-2.7b-shape": 2.652e9,
    "opt-13b-shape": 12.85e9,
    "opt-30b-shape": 29.97e9,
    "smollm2-135m-shape": 134.5e6,
    "llama3-8b-shape": 8.030e9,
    "llama3-70b-shape": 70.55e9,
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "opt-tiny-shape"])
def test_a_shape_has_as_many_parameters_as_its_name_says(name: str):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=0.001)


def test_the_tiny_shape_runs():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(shape_config("opt-tiny-shape")).eval()
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 512)


def test_an_unknown_shape_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'opt-9b-shape'; use one of .*opt-125m-shape"):
        shape_config("opt-9b-shape")
