"""Every wrapper goes around every method of the package; by default around a few of them, drawn by the date."""

from __future__ import annotations

from typing import Any

import pytest
from cases import ARGS, PROBLEMS, MethodCase, optimizer_for, zeroth_order
from daily import daily_slice

from l2l.methods.base import Method
from l2l.methods.wrappers import wrapper_names

pytestmark = pytest.mark.in_turn

AROUND: dict[str, dict[str, Any]] = {"blockwise": {"level": "block", "groups": 2}, "hybrid": {"match": "norm"}}
CASES = [
    MethodCase(f"{outer}+{inner}", {name: ARGS.get(name, {}) | AROUND.get(name, {}) for name in (outer, inner)})
    for outer in wrapper_names()
    for inner in zeroth_order()
    if inner not in wrapper_names()
]
TINY_LM = PROBLEMS[2]
STEPS = 20


@pytest.mark.parametrize("case", daily_slice(CASES, 8, name=lambda case: case.name))
def test_it_descends_by_the_passes_it_declares(case: MethodCase):
    model = TINY_LM.make()
    first, spent = model().item(), 0.0
    optimizer = optimizer_for(case, model, TINY_LM)
    for _ in range(STEPS):
        optimizer.step(model)
        assert optimizer.report is not None
        spent += optimizer.report.passes
    assert isinstance(optimizer.method, Method)
    assert model().item() < 0.99 * first
    assert spent / STEPS == pytest.approx(optimizer.method.passes, rel=0.05)
