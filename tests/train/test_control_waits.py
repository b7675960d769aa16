"""Under ``lr="auto"`` theta waits until the curvature is known well enough."""

from __future__ import annotations

import pytest
from cases import Quadratic, farthest, weights

import l2l
from l2l.optim import CurvatureLR


@pytest.mark.parametrize(("every", "warm_up", "first"), [(5, 5, 2), (5, 0, 10), (1, 0, 2)])
def test_theta_stays_until_three_curvatures_are_known(every: int, warm_up: int, first: int):
    """The first alone may be next to 0: here by a loss that is flat, and steep along the gradient, in the first step."""
    model = Quadratic().double()
    start = weights(model)
    optimizer = l2l.MeZO(model, lr="auto", control=CurvatureLR(every=every, warm_up=warm_up, resolution=2.0**-48))
    flat = sum(parameter.sum() for parameter in model.parameters())
    optimizer.step(lambda: 100 * sum(parameter.sum() for parameter in model.parameters()) - 100 * flat)
    assert optimizer.report is not None and optimizer.report.curvature is not None
    assert optimizer.report.curvature < 1e-3 and abs(optimizer.report.projected_gradient) > 1
    for _ in range(first - 1):
        assert optimizer.report.lr == (0.0, 0.0)
        optimizer.step(model)
    assert farthest(weights(model), start) < 1e-12
    optimizer.step(model)
    assert optimizer.report.lr[0] == pytest.approx(0.1 / optimizer.curvature_lr_state.average)
    assert 1e-6 < farthest(weights(model), start) < 1
