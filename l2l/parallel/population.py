"""A population over workers: every worker evaluates some directions of a step, and what they gave makes the step everywhere.

Pure parts, without a transport, in the order in which a step uses them:

1. :func:`plan_points`: where a method evaluates in a step, found by taking the step with a closure that computes nothing.
2. :func:`deal`: which points are whose: all of a direction go to one worker.
3. :func:`evaluate_points`: what a closure gives at some of the points.
4. :class:`Answers`: a closure that gives the collected values in the order of the plan, with which the step is taken.

A worker that has not answered costs its members: ``left_out`` of :meth:`l2l.optim.ZOOptimizer.step`. Weights are perturbed
functionally, since walking to points of one's own would leave roundings of one's own behind.
Evolution strategies scale like this: Salimans et al. 2017, arXiv:1703.03864, where workers share seeds and send returns.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, final

import torch

from l2l.estimators import Closure, ClosureValue, Estimate, MicroBatched
from l2l.methods.base import FirstOrder
from l2l.noise import Key
from l2l.optim import ZOOptimizer, zo_step
from l2l.parallel.values import share
from l2l.params import Direction, PerturbedParameters

LEAST = 2
"""Members that a step needs: below, a population has no spread of losses."""


@final
@dataclass(frozen=True)
class Point:
    """theta + distance * u of a direction, or theta itself."""

    direction: Direction | None
    distance: float

    @property
    def member(self) -> int | None:
        """The draw of the direction; None at theta, which all members share."""
        return None if self.direction is None or not self.distance else self.direction.key.draw

    @property
    def place(self) -> tuple[int | None, float]:
        """What a point is known by: its member, and the distance."""
        return self.member, self.distance


class _Planned(Exception):
    """A step has evaluated all that it will."""


def plan_points(optimizer: ZOOptimizer) -> tuple[Point, ...]:
    """Where the next step of ``optimizer`` evaluates, in its order. Nothing is computed, and nothing moves.

    Raises:
        ValueError: the method cannot be spread: weights are perturbed in place, it has one direction, or what it evaluates
            depends on what the evaluations before gave.
    """
    method, theta, points = optimizer.method, optimizer.theta, list[Point]()
    name = type(method).__name__
    if isinstance(method, FirstOrder):
        raise ValueError(f"a step of {name} cannot be spread over workers: it has no directions")
    if theta.mode != "functional":
        raise ValueError(
            f"a step of {name} cannot be spread over workers: its weights are perturbed in place; use perturb='functional'"
        )
    adaptive = f"a step of {name} cannot be spread over workers: it evaluates where earlier ones say; use --parallel data"
    if not method.fixed_points:
        raise ValueError(adaptive)

    def noted() -> float:
        at = theta.displacement
        points.append(Point(at.direction, at.distance))
        return 0.0

    def stop(_: Sequence[Estimate]) -> NoReturn:
        raise _Planned

    key, rates = Key(optimizer.seed, optimizer.steps_done), (0.0,) * len(theta.blocks)
    own = theta, method, optimizer.method_state, key, rates, None, None, optimizer.curvature_lr, optimizer.curvature_lr_state
    with suppress(_Planned):
        zo_step(noted, *own, check=stop)
    measured = 1 if optimizer.curvature_lr is not None else 0  # a third loss, at some steps
    if not method.passes <= len(points) <= method.passes + measured:  # further ones belong to the update
        raise ValueError(adaptive)
    if len(members_of(points)) < LEAST:
        raise ValueError(
            f"a step of {name} has {len(members_of(points))} direction, and workers share directions: set --num_directions to "
            "at least as many as there are workers, or use --parallel data"
        )
    return tuple(points)


def members_of(points: Sequence[Point]) -> list[int]:
    """The members of a plan, each once, in its order."""
    return list(dict.fromkeys(point.member for point in points if point.member is not None))


def deal(points: Sequence[Point], size: int) -> list[list[int]]:
    """Indices of the points of each of ``size`` workers: members in contiguous parts; the first has theta as well."""
    members = members_of(points)
    owner = {members[i]: worker for worker in range(size) for i in share(len(members), worker, size)}
    parts: list[list[int]] = [[] for _ in range(size)]
    for index, point in enumerate(points):
        parts[0 if point.member is None else owner[point.member]].append(index)
    return parts


def evaluate_points(closure: Closure, theta: PerturbedParameters, points: Sequence[Point]) -> list[ClosureValue]:
    """What the closure returns at each point, in their order. The parameters are as before afterwards, bit for bit.

    A closure that keeps something of its first evaluation is evaluated at theta first, at one further pass, so that all
    workers keep the same.
    """
    found: list[ClosureValue] = []
    try:
        if points and points[0].direction is not None and _keeps_first(closure):
            theta.unperturb()
            with torch.no_grad():
                theta.evaluate(closure)
        for point in points:
            if point.direction is None:
                theta.unperturb()
            else:
                theta.perturb(point.direction, point.distance)
            with torch.no_grad():
                found.append(theta.evaluate(closure))
    finally:
        theta.restore()
    return found


def _keeps_first(closure: Closure) -> bool:
    pieces = closure.pieces if isinstance(closure, MicroBatched) else (closure,)
    return any(getattr(piece, "keeps_first", False) for piece in pieces)


@final
class Answers:
    """Gives the values that workers have sent, in the order in which a step asks for them.

    Args:
        values: by index of the point.
        left_out: members that nobody has evaluated: the step does not ask for them.
    """

    def __init__(
        self,
        theta: PerturbedParameters,
        points: Sequence[Point],
        values: Mapping[int, ClosureValue],
        left_out: Collection[int] = (),
    ) -> None:
        self._theta = theta
        kept = (index for index, point in enumerate(points) if point.member not in left_out)
        self._coming: Iterator[tuple[Point, ClosureValue]] = iter([(points[index], values[index]) for index in kept])

    def __call__(self) -> ClosureValue:
        at = self._theta.displacement
        point, value = next(self._coming, (None, 0.0))
        if point is None or point.place != Point(at.direction, at.distance).place:
            raise ValueError("the step evaluates elsewhere than was planned, as this method does: use --parallel data")
        return value
