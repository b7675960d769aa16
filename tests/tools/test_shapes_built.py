"""Random models of a named shape."""

from __future__ import annotations

import pytest
import torch

from l2l.models.shapes import SHAPES, shape_config
from l2l.tools.bench import SPREAD, build

CPU = torch.device("cpu")


def test_matrices_are_random_norms_one_and_biases_zero():
    model = build("opt-tiny-shape", "fp32", CPU)
    assert not model.training
    matrices = [p for p in model.parameters() if p.ndim > 1]
    whole = torch.cat([p.detach().flatten() for p in matrices])
    assert whole.std().item() == pytest.approx(SPREAD, rel=0.02)
    assert whole.mean().item() == pytest.approx(0, abs=SPREAD / 100)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name


def test_weights_depend_on_the_seed_only_and_the_head_stays_tied():
    first, same, other = (build("opt-tiny-shape", "bf16", CPU, seed) for seed in (0, 0, 1))
    assert first.dtype == torch.bfloat16
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    pairs = list(zip(first.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(left, right) for left, right in pairs)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_nothing_but_parameters_to_fill(name: str):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert list(model.buffers()) == []


def test_a_model_of_another_name_is_loaded():
    assert build("l2l/tiny", "fp32", CPU, length=16).name_or_path.endswith("tiny")


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="max_length 129"):
        build("opt-tiny-shape", "fp32", CPU, length=129)
