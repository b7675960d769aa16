"""Traces of the Hessian's blocks, per component of the direction: three estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.meta.objectives.base import MetaState
from l2l.meta.statistics import Components, NoiseDots, squared_norms
from l2l.methods.base import check_counts
from l2l.params import Direction

Trace: TypeAlias = Literal["fisher", "hutchinson", "seen"]
"""``fisher``: squared gradient norms under labels that the model draws; the Gauss-Newton matrix, never negative.
``hutchinson``: curvature along Rademacher noise of all blocks; the Hessian itself. ``seen``: curvature along the noise of
the deployed step, so that what is measured is the very direction that is walked."""

PROBES = 2**20
"""Draw from which the probes' keys begin: no method looks along so many directions in a step."""


def check_trace(trace: str, probes: int) -> None:
    """Raise ValueError, naming the value, where there is no such estimate."""
    check_counts(probes=probes)
    if trace not in get_args(Trace):
        raise ValueError(f"trace={trace!r} must be one of {', '.join(get_args(Trace))}")


def traces(
    point: MetaState, components: Components, direction: Direction, trace: Trace, probes: int
) -> tuple[Tensor, int]:
    """[components] float64 estimates of trace(P_k H), averaged over the probes, and the passes they took.

    Args:
        direction: of the deployed step at theta.
        probes: sets of drawn labels, Rademacher directions, or (``seen``) batches, A being the first.

    Raises:
        ValueError: labels are to be drawn and the point does not say how.
    """
    found, passes = components.zeros(), 0
    for probe in range(probes):
        one, cost = _PROBES[trace](point, components, direction, probe)
        found, passes = found + one / probes, passes + cost
    return found, passes


def _fisher(point: MetaState, components: Components, direction: Direction, probe: int) -> tuple[Tensor, int]:
    if point.sampled is None:
        raise ValueError(
            "trace='fisher' draws labels from the model, which this task offers no way to: use 'hutchinson'"
        )
    sampled = point.sampled(probe)
    return sampled.count * squared_norms(point.theta.blocks, components, sampled.closure), sampled.passes


def _hutchinson(point: MetaState, components: Components, direction: Direction, probe: int) -> tuple[Tensor, int]:
    key = point.key.with_draw(PROBES + probe)
    rademacher = Direction(key, (1.0,) * len(point.theta.blocks), "rademacher")
    return _bend(point, components, rademacher, 0), 6


def _seen(point: MetaState, components: Components, direction: Direction, probe: int) -> tuple[Tensor, int]:
    """u = factor * (sigma_b z_b + ...): <z_b, (H u)_b> has the mean factor * sigma_b * trace(H_b). A block that does not
    move shows nothing: 0."""
    reach = direction.factor * components.blocks_scales(direction)
    bend = _bend(point, components, direction, probe)
    return torch.where(reach > 0, bend / reach, torch.zeros_like(bend)), 6


_PROBES = {"fisher": _fisher, "hutchinson": _hutchinson, "seen": _seen}


def _bend(point: MetaState, components: Components, direction: Direction, number: int) -> Tensor:
    """<z_b, (H u)_b> and its like inside the bases, from gradients at both sides of theta along u; two backward passes."""
    closure = point.closure if number == 0 else point.further(number - 1)
    found, epsilon = components.zeros(), point.method.epsilon
    with point.theta.step():
        for side in (1.0, -1.0):
            dots = _Projected(components, direction)
            point.theta.perturb(direction, side * epsilon)
            consume_gradients(closure, point.theta.blocks, dots.take)
            found += side * dots.values() / (2 * epsilon)
    return found


@final
class _Projected:
    """Inner products of gradients with a direction's dense noise, under every component of the block."""

    def __init__(self, components: Components, direction: Direction) -> None:
        self._components, self._direction = components, direction
        self._dense = NoiseDots(components.blocks, replace(direction, basis=None, basis_sigma=()))
        self._found = components.zeros()

    def take(self, index: int, gradient: Tensor) -> None:
        """Note a block's gradient."""
        self._dense.take(index, gradient)
        self._components.inside(self._found, index, self._direction, gradient, 1.0)

    def values(self) -> Tensor:
        """[components] float64."""
        self._found[: len(self._components.blocks)] = self._dense.values()
        return self._found
