"""Loss curves against forward passes: smoothing, and when a target was reached."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import fsum, inf
from typing import TypeAlias

Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (forward passes spent, two-point loss of the step that ended there), in order."""


def smoothed(curve: Curve, window: float) -> list[tuple[float, float]]:
    """Running mean of the losses over the last ``window`` passes, from where that many have been spent."""
    recent: deque[tuple[float, float]] = deque()
    means = []
    for passes, loss in curve:
        recent.append((passes, loss))
        while recent[0][0] <= passes - window:
            recent.popleft()
        if passes >= window:
            means.append((passes, fsum(value for _, value in recent) / len(recent)))
    return means


def passes_to(curve: Curve, target: float, window: float) -> float:
    """Forward passes after which the smoothed loss is at or below ``target`` for the first time; infinity if never."""
    return next((passes for passes, loss in smoothed(curve, window) if loss <= target), inf)


def mean_by_x(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean y of each x, in the order of x."""
    values: dict[float, list[float]] = {}
    for x, y in points:
        values.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(values.items())]
