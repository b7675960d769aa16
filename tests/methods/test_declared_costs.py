"""What every method declares of its costs, and what ``l2l estimate`` predicts by it, against real steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from cases import METHODS, MethodCase, named
from daily import daily_slice
from torch import Tensor

from l2l.methods.registry import declared_method
from l2l.models.shapes import shape_config
from l2l.optim import ZOOptimizer
from l2l.tools.estimate import EstimateConfig, run_estimate

SHAPE, ROWS, LENGTH, STEPS = "opt-tiny-shape", 2, 8, 6
"""6 steps are whole intervals of all cases: searches, anchors, masks."""
CASES = [
    *(case for case in METHODS if case.name != "pseuzo"),
    MethodCase("pseuzo", {}),  # with a window that holds the logits of this model
    MethodCase("adamw", {}),
    MethodCase("sgd", {}),
    MethodCase("sgd", {"momentum": 0.9}),
]
AT_MOST = ("pseuzo",)
"""Methods that declare a limit on their state, whose size depends on the batch."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a method's state."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def tuner_tensors(method: Any) -> list[Tensor]:
    """The weights of the tuner in a method or in one that it wraps."""
    if hasattr(method, "tuner"):
        return list(method.tuner.network.parameters())
    return tuner_tensors(method.inner) if hasattr(method, "inner") else []


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    config = shape_config(SHAPE)
    config._attn_implementation = "eager"  # has a rule for forward-mode differentiation
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("case", daily_slice(CASES, 12, name=named))
def test_the_estimate_predicts_the_passes_and_the_state_of_real_steps(case: MethodCase, model: Any):
    predicted = run_estimate(EstimateConfig(SHAPE, "fp32", ROWS, LENGTH, method=case.name, method_args=case.args, steps=STEPS))
    method, ids = declared_method(case.name, case.args, model), torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    optimizer, passes = ZOOptimizer(model, method, lr=1e-6), 0
    for _ in range(STEPS):
        optimizer.step(lambda: model(ids, labels=ids).loss)
        assert optimizer.report is not None
        passes += optimizer.report.passes
    assert predicted["passes"] == passes
    held = sum(tensor.nbytes for tensor in (*tensors_in(optimizer.method_state), *tuner_tensors(method)))
    if case.name in AT_MOST:
        assert 0 < held <= predicted["bytes"]["method"]
    else:
        assert held == predicted["bytes"]["method"]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_what_a_list_prints_of_a_method_is_there(case: MethodCase, model: Any):
    method = declared_method(case.name, case.args, model)
    assert method.info.paper and method.info.memory
    assert (type(method).__doc__ or "").strip()
