"""A zeroth-order method: where to look, and what to do with what was seen. Its state is its whole memory.

A first-order baseline is told the gradient, and looks nowhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Closure, Estimate, center_loss, loss_along, one_sided, two_point
from l2l.noise import Key
from l2l.params import Direction, PerturbedParameters, dense_direction
from l2l.params.blocks import Blocks

State = TypeVar("State")


@dataclass(frozen=True)
class MethodInfo:
    """What a list of methods says of one."""

    paper: str
    """Who and where, with the equation or algorithm."""
    memory: str
    """What is kept between steps beside the weights, in copies of them (``1P``) or as a formula."""


@dataclass(frozen=True)
class StepContext:
    """What a step offers to a method besides the estimates."""

    key: Key
    lr: tuple[float, ...]
    """Learning rate of each block, as this step uses it."""
    closure: Closure
    """Loss on this step's batch."""
    fresh: Callable[[int], Closure]
    """``fresh(i)`` is the loss on the i-th further batch of this step, or this step's own where there is no other."""
    curvature: float | None = None
    """Along the first direction, at the steps where ``lr="auto"`` measures it."""


@dataclass(frozen=True)
class LossEvaluator:
    """What a method that looks in its own way is given: the ways to look. Every pass is counted."""

    theta: PerturbedParameters
    key: Key
    closure: Closure
    """Loss on this step's batch at the parameters as they stand."""
    transform: Callable[[Direction], Direction]
    """What becomes of a direction before anybody looks along it: what is wrapped around the method (a tuner's sigma, a
    mask) acts here. The functions below apply it; the estimates hold the direction that was walked."""

    def with_transform(self, aim: Callable[[Direction], Direction]) -> LossEvaluator:
        """The sight of what is wrapped: its directions pass through ``aim``, and then through what lies around."""
        return replace(self, transform=lambda direction: self.transform(aim(direction)))

    def center(self) -> float:
        """The loss at theta."""
        return center_loss(self.closure, self.theta)

    def along(self, direction: Direction, distance: float) -> float:
        """The loss at theta + distance * u."""
        return loss_along(self.closure, self.theta, self.transform(direction), distance)

    def two_point(self, direction: Direction, epsilon: float) -> Estimate:
        """See :func:`l2l.estimators.finite_difference.two_point`."""
        return two_point(self.closure, self.theta, self.transform(direction), epsilon)

    def one_sided(
        self, directions: Sequence[Direction], epsilon: float, home: float | None = None
    ) -> tuple[Estimate, ...]:
        """See :func:`l2l.estimators.finite_difference.one_sided`."""
        return one_sided(self.closure, self.theta, [self.transform(d) for d in directions], epsilon, home)


class Method(ABC, Generic[State]):
    """Abstract method. States are frozen dataclasses of tensors and numbers, or None: they are saved as they stand.

    Tensors of a state may be changed in place by an update, once nothing can go wrong any more: after the last evaluation,
    and after ``theta.restore()`` where a direction is made of them.
    """

    info: ClassVar[MethodInfo]
    step_is_normalized: bool = False
    """Whether the step's length does not follow the gradient's: its learning rate is then of another size than MeZO's,
    and ``lr="auto"``, a share of the way to the bottom of the parabola seen, has no meaning for it."""
    leaves_span: bool = False
    """Whether coordinates are changed one by one on the way from what was seen to the step (a sign, a running variance): it
    then leaves the span of the directions looked along."""
    differentiates: bool = False
    """Whether it takes derivatives of the loss (in forward mode, or by backpropagation in part), which an objective such as
    F1 has not."""
    epsilon: float
    """How far along u each evaluation lies: a coordinate of block b moves by about epsilon * sigma_b."""
    num_directions: int
    """Directions looked along per step; their estimates are averaged."""

    @property
    @abstractmethod
    def passes(self) -> float:
        """Forward passes of a step on average, those of step control apart; a backward pass counts as two more."""

    @property
    def passes_once(self) -> float:
        """Of the passes, those that a step takes once, however many estimates it has."""
        return self.passes - 2.0 * self.num_directions

    @abstractmethod
    def state_bytes(self, blocks: Blocks) -> int:
        """Most bytes of tensors that are kept between steps for these blocks."""

    @abstractmethod
    def init(self, blocks: Blocks) -> State:
        """State before the first step."""

    @abstractmethod
    def direction(self, blocks: Blocks, state: State, key: Key) -> Direction:
        """Where to look under ``key``."""

    @abstractmethod
    def update_(
        self, theta: PerturbedParameters, state: State, estimates: Sequence[Estimate], context: StepContext
    ) -> State:
        """Move theta according to what was seen; give the next state."""


class CustomEstimator(Method[State]):
    """Abstract method that looks in its own way: to one side, at more points, or where earlier looks tell it to."""

    @property
    def passes_once(self) -> float:
        return 0.0

    @abstractmethod
    def estimate(self, evaluator: LossEvaluator, state: State) -> tuple[tuple[Estimate, ...], State]:
        """What was seen, and the state with which the update goes on. Nothing has moved in the end."""


def run_estimator(method: Method[Any], evaluator: LossEvaluator, state: Any) -> tuple[tuple[Estimate, ...], Any]:
    """What a method sees, in its own way or to both sides of each of its directions; and its state for the update."""
    if isinstance(method, CustomEstimator):
        return method.estimate(evaluator, state)
    directions = directions_of(method, evaluator, state)
    return tuple(evaluator.two_point(direction, method.epsilon) for direction in directions), state


def directions_of(method: Method[Any], evaluator: LossEvaluator, state: Any) -> list[Direction]:
    """Where the method looks, a direction per draw. Before any look: they may read theta at home."""
    keys = [evaluator.key.with_draw(draw) for draw in range(method.num_directions)]
    return [method.direction(evaluator.theta.blocks, state, key) for key in keys]


class FirstOrder(ABC, Generic[State]):
    """Abstract first-order baseline: the ceiling that forward passes alone are held against.

    States are as those of :class:`Method`; their tensors are float32 and may be changed in place by an update.
    """

    info: ClassVar[MethodInfo]

    @property
    @abstractmethod
    def copies(self) -> int:
        """How many tensors of a block's size the state holds for each block."""

    @abstractmethod
    def init(self, blocks: Blocks) -> State:
        """State before the first step."""

    @abstractmethod
    def update_(
        self, theta: PerturbedParameters, state: State, gradients: MutableMapping[int, Tensor], lr: Sequence[float]
    ) -> State:
        """Move theta against the gradients; give the next state.

        Args:
            gradients: of each block by its index; a block that the loss does not reach has none. They are taken out
                one by one, so that each is freed as soon as it has been used.
            lr: learning rate of each block.
        """


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a running mean over weights of ``dtype`` is kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def descend(theta: PerturbedParameters, estimates: Sequence[Estimate], lr: Sequence[float]) -> None:
    """SGD along the directions seen: ``theta_b -= lr_b * mean(projected gradient * u_b)``."""
    for estimate in estimates:
        weight = -estimate.projected_gradient / len(estimates)
        theta.add(estimate.direction, [weight * rate for rate in lr])


def gradient(blocks: Blocks, index: int, estimates: Sequence[Estimate]) -> Tensor:
    """The estimated gradient of a block, mean(projected gradient * u_b), of its shape and at least float32."""
    total = dense_direction(estimates[0].direction, blocks, index).mul_(estimates[0].projected_gradient)
    for estimate in estimates[1:]:
        total.add_(dense_direction(estimate.direction, blocks, index), alpha=estimate.projected_gradient)
    return total.div_(len(estimates)) if len(estimates) > 1 else total


def check_positive(**values: float) -> None:
    """Raise ValueError, naming the first value that is not a positive finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite")


def check_counts(**values: int) -> None:
    """Raise ValueError, naming the first value that is not a positive whole number."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value} must be a whole number, at least 1")


def check_choice(choices: Sequence[str], **values: str) -> None:
    """Raise ValueError, naming the first value that is none of the choices."""
    for name, value in values.items():
        if value not in choices:
            *others, last = map(repr, choices)
            raise ValueError(f"{name}={value!r} must be {', '.join(others)} or {last}")
