"""What a method is: it proposes a direction, gets losses along it, and updates the weights. Its state is its whole memory.

:class:`Method` holds the defaults, which together are MeZO: unit noise, central differences, SGD along the directions.
:class:`CustomEstimator` evaluates the loss in another way, :class:`Wrapper` changes another method, and
:class:`FirstOrder` is a backpropagation baseline. What a method costs is declared here once (``passes``, ``state_bytes``,
``scratch_bytes``, ``differentiates``, ``info``); ``l2l estimate``, ``l2l compare`` and ``l2l methods list`` read it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast, get_args

import torch

from l2l.arguments import plain_scalars
from l2l.estimators import (
    BatchOutputs,
    Closure,
    Estimate,
    center_loss,
    finite_loss,
    loss_along,
    one_sided,
    read_outputs,
    two_point,
)
from l2l.noise import Distribution, Key
from l2l.params import Blocks, Direction, DirectionOperator, PerturbedParameters, dense_direction
from l2l.params.blocks import Block as Block

State = TypeVar("State")
Estimates: TypeAlias = tuple[Estimate, ...]
"""Estimates of a step, one per direction."""
Estimator: TypeAlias = Literal["two_sided", "one_sided"]
"""``two_sided``: central differences, two passes per direction. ``one_sided``: differences from one loss at theta, which all
directions share: one pass per direction and one more, so that N directions cost about half; exact on linear losses, with a
bias of epsilon / 2 * u^T H u on quadratics."""


@dataclass(frozen=True)
class MethodInfo:
    """What lists and tables print of a method."""

    paper: str
    """Authors, year and identifier, with the equation or algorithm."""
    memory: str = "0P"
    """What is kept between steps beside the weights, in copies of the trained weights (``1P``) or as a formula: the
    readable form of ``state_bytes``."""


Reading: TypeAlias = Callable[[Callable[[], Sequence[float]]], list[float]]


def evaluate_reading(compute: Callable[[], Sequence[float]]) -> list[float]:
    """The floats that the function computes."""
    return list(compute())


@dataclass(frozen=True)
class StepContext:
    """What a step gives to an update besides the estimates."""

    key: Key
    lr: tuple[float, ...]
    """Learning rate of each block in this step."""
    closure: Closure
    """Loss on this step's batch."""
    fresh: Callable[[int], Closure]
    """``fresh(i)`` is the loss on the i-th further batch of this step, or on this step's own where there is no other."""
    curvature: float | None = None
    """Along the first direction, at the steps where ``lr="auto"`` measures it."""
    reading: "Reading" = evaluate_reading
    """As of :class:`LossEvaluator`."""


@dataclass(frozen=True)
class LossEvaluator:
    """Loss-evaluation interface for methods with an estimator of their own. Every forward pass is counted."""

    theta: PerturbedParameters
    key: Key
    closure: Closure
    """Loss on this step's batch at the current parameters."""
    transform: Callable[[Direction], Direction]
    """Applied to every direction before evaluation: the wrappers around the method (a tuner's sigma, a mask). The functions
    below apply it; the estimates hold the transformed direction."""
    reading: "Reading" = evaluate_reading
    """Gives the floats that a function reads from evaluations beside their losses (from logits, activations, gradients). They
    are logged: a replay gives them in its place, and calls no closure that the function calls."""
    left_out: frozenset[int] = frozenset()
    """Draws of a population that nobody has evaluated: their directions are no part of the step."""

    def watched_center(self, watch: Callable[[Closure], Any], first: Direction) -> float:
        """The loss at theta, ``watch`` calling the closure; ``first`` is the first direction that is evaluated next."""
        own = replace(self, closure=lambda: watch(self.closure))
        # Half precision is evaluated on the copies that perturbing makes: norms and biases are then float32 in all losses.
        return own.center() if self.theta.update is None else own.along(first, 0.0)

    def with_transform(self, inner: Callable[[Direction], Direction]) -> "LossEvaluator":
        """The same with directions going through ``inner`` first, then through the present transform."""
        return replace(self, transform=lambda direction: self.transform(inner(direction)))

    def keys(self, count: int) -> list[Key]:
        """Keys of ``count`` draws, less those left out."""
        return [self.key.with_draw(draw) for draw in range(count) if draw not in self.left_out]

    def center(self) -> float:
        """The loss at theta."""
        return center_loss(self.closure, self.theta)

    def center_outputs(self) -> BatchOutputs:
        """What the closure tells of its batch at theta. One forward pass, as :meth:`center`."""
        return self._outputs(LossEvaluator.center)

    def outputs_along(self, direction: Direction, distance: float) -> BatchOutputs:
        """What the closure tells of its batch at theta + distance * u."""
        return self._outputs(lambda own: own.along(direction, distance))

    def _outputs(self, evaluate: Callable[["LossEvaluator"], float]) -> BatchOutputs:
        found: list[BatchOutputs] = []

        def read() -> float:
            found.append(read_outputs(self.closure))
            return found[-1].loss

        evaluate(replace(self, closure=read))
        return found[0]

    def along(self, direction: Direction, distance: float) -> float:
        """The loss at theta + distance * u."""
        return loss_along(self.closure, self.theta, self.transform(direction), distance)

    def two_point(self, direction: Direction, epsilon: float) -> Estimate:
        """See :func:`l2l.estimators.two_point`."""
        return two_point(self.closure, self.theta, self.transform(direction), epsilon)

    def one_sided(self, directions: Sequence[Direction], epsilon: float, loss_center: float | None = None) -> Estimates:
        """See :func:`l2l.estimators.one_sided`."""
        return one_sided(self.closure, self.theta, [self.transform(d) for d in directions], epsilon, loss_center)

    def estimates(self, method: "Method[Any]", directions: Sequence[Direction], loss_center: float | None = None) -> Estimates:
        """Estimates along all directions by the method's ``estimator``; ``loss_center`` is the one of one-sided estimates."""
        if method.estimator == "one_sided":
            return self.one_sided(directions, method.epsilon, loss_center)
        return tuple(self.two_point(direction, method.epsilon) for direction in directions)


@dataclass(frozen=True)
class Method(ABC, Generic[State]):
    """Abstract zeroth-order method. States are frozen dataclasses of tensors and numbers, or None: they are saved as is.

    Tensors of a state may be changed in place by an update, but only once nothing can fail any more: after the last
    evaluation, after ``theta.restore()`` where a direction is made of them, and after ``theta.final()``.

    Raises:
        ValueError: epsilon is not positive and finite, num_directions not a whole number from 1, or a name unknown.
    """

    info: ClassVar[MethodInfo]
    step_is_normalized: ClassVar[bool] = False
    """Whether the length of a step does not follow the length of the gradient. Its learning rate then has another scale than
    MeZO's, and ``lr="auto"``, a fraction of the step to the minimum of a parabola, is refused."""
    leaves_span: ClassVar[bool] = False
    """Whether coordinates are changed one by one (a sign, a running variance), so that the step leaves the span of the
    directions that were evaluated."""
    differentiates: ClassVar[bool] = False
    """Whether it takes derivatives of the loss, in forward mode or by backpropagation in part: it then cannot minimise an
    objective such as F1, and holds activations of more than one layer."""
    reads_outputs: ClassVar[bool] = False
    """Whether it makes use of closures that return logits, or losses per example; with a scalar loss it works, less well."""
    default_lr: ClassVar[float | None] = None
    """Learning rate that needs no tuning, where the method sets the length of its steps itself; None: the scheme's."""
    fixed_points: ClassVar[bool] = True
    """Whether where a step evaluates is known before its first evaluation, so that workers may share its directions."""
    not_replayable: ClassVar[str] = ""
    """Why the run log does not rebuild the weights: what is read from evaluations beside losses and logged readings."""
    accumulates: ClassVar[int] = 0
    """How many :func:`accumulators` the state holds, where it holds no other tensors."""
    positive: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[tuple[str, ...]] = ()
    fractions: ClassVar[tuple[str, ...]] = ()
    """Names of fields that must be positive; whole numbers of at least 1; at least 0 and below 1."""

    epsilon: float = 1e-3
    """Distance of each evaluation along u: a coordinate of block b moves by about epsilon * sigma_b."""
    num_directions: int = 1
    """Directions evaluated per step; their estimates are averaged."""
    distribution: Distribution = "gaussian"
    """``gaussian`` noise, or ``rademacher``: plus or minus one; ``packed_rademacher``: the same, made 32 directions at a time,
    for populations."""
    estimator: Estimator = field(default="two_sided", kw_only=True)
    """``two_sided`` or ``one_sided`` differences; see :data:`Estimator`."""

    def __post_init__(self) -> None:
        plain_scalars(self)
        check_positive(**{name: getattr(self, name) for name in ("epsilon", *self.positive)})
        check_counts(**{name: getattr(self, name) for name in ("num_directions", *self.counts)})
        check_fractions(**{name: getattr(self, name) for name in self.fractions})
        check_choice("distribution", self.distribution, get_args(Distribution))
        check_choice("estimator", self.estimator, get_args(Estimator))

    @property
    def passes(self) -> float:
        """Forward passes per step on average, without those of ``lr="auto"``. A backward pass counts as two more."""
        return self.num_directions + 1.0 if self.estimator == "one_sided" else 2.0 * self.num_directions

    @property
    def whole_passes(self) -> float:
        """Of the passes, those that run all layers: along a direction of the top blocks alone a pass may begin there."""
        return self.passes

    @property
    def passes_once(self) -> float:
        """Of the passes, those that a step takes once, however many groups of blocks it evaluates (``blockwise+``)."""
        return self.passes - (1 if self.estimator == "one_sided" else 2) * self.num_directions

    @property
    def from_center(self) -> bool:
        """Whether a step evaluates theta first, and from there along directions alone."""
        return self.estimator == "one_sided"

    def state_bytes(self, blocks: Blocks) -> int:
        """Bytes of the tensors that are kept between steps: those of the state, and of a tuner."""
        return self.accumulates * accumulator_bytes(blocks)

    def scratch_bytes(self, blocks: Blocks) -> int:
        """Most bytes of further tensors that a step holds for itself (a mask, a copy of blocks), at most until the next
        step; without activations and the copies that perturbing makes."""
        return 0

    def init(self, blocks: Blocks) -> State:
        """State before the first step."""
        return cast(State, None)

    def unit_direction(self, blocks: Blocks, key: Key, shape: DirectionOperator | None = None) -> Direction:
        """A direction of scale 1 in every block: plain noise, or what ``shape`` writes."""
        return Direction(key, (1.0,) * len(blocks), self.distribution, shape=shape)

    def direction(self, blocks: Blocks, state: State, key: Key) -> Direction:
        """The direction to evaluate under ``key``."""
        return self.unit_direction(blocks, key)

    def update_(self, theta: PerturbedParameters, state: State, estimates: Estimates, context: StepContext) -> State:
        """Move theta according to the estimates; the next state. By default SGD along their directions."""
        descend(theta, estimates, context.lr)
        return state


@dataclass(frozen=True)
class CustomEstimator(Method[State]):
    """Abstract method with an estimator of its own: at more points, or at points that earlier losses choose."""

    fixed_points: ClassVar[bool] = False
    estimator: Estimator = field(default="two_sided", init=False, kw_only=True)
    """Not a choice: :meth:`estimate` evaluates."""

    @property
    def passes_once(self) -> float:
        return 0.0

    @abstractmethod
    def estimate(self, evaluator: LossEvaluator, state: State) -> tuple[Estimates, State]:
        """The estimates, and the state that the update continues with. The parameters must not have moved in the end."""


@dataclass(frozen=True)
class Wrapper(CustomEstimator[State]):
    """Abstract wrapper: changes where another method, ``inner``, evaluates, or what it updates. Costs are those of inner."""

    epsilon: float = field(init=False)
    num_directions: int = field(init=False)
    distribution: Distribution = field(init=False)
    inner: Method[Any]

    def __post_init__(self) -> None:
        flags = ("step_is_normalized", "leaves_span", "differentiates", "reads_outputs", "default_lr")
        flags = (*flags, "fixed_points", "not_replayable")
        for name in ("epsilon", "num_directions", "distribution", "estimator", *flags):
            object.__setattr__(self, name, getattr(self.inner, name))
        super().__post_init__()

    @property
    def passes(self) -> float:
        return self.inner.passes

    @property
    def whole_passes(self) -> float:
        return self.inner.whole_passes

    @property
    def passes_once(self) -> float:
        return self.inner.passes_once

    @property
    def from_center(self) -> bool:
        return self.inner.from_center

    def state_bytes(self, blocks: Blocks) -> int:
        return self.inner.state_bytes(blocks)

    def scratch_bytes(self, blocks: Blocks) -> int:
        return self.inner.scratch_bytes(blocks)


def run_estimator(method: Method[Any], evaluator: LossEvaluator, state: Any) -> tuple[Estimates, Any]:
    """The method's estimates and its state for the update: by an estimator of its own, or by the one it names."""
    if isinstance(method, CustomEstimator):
        return method.estimate(evaluator, state)
    return evaluator.estimates(method, directions_of(method, evaluator, state)), state


def directions_of(method: Method[Any], evaluator: LossEvaluator, state: Any, count: int | None = None) -> list[Direction]:
    """``count`` directions of a step (default: num_directions), less those left out, before any transform. Made before any
    evaluation, since they may read the unperturbed weights."""
    keys = evaluator.keys(count or method.num_directions)
    return [method.direction(evaluator.theta.blocks, state, key) for key in keys]


class FirstOrder(ABC, Generic[State]):
    """Abstract first-order baseline: an upper bound on what forward passes alone can reach.

    States are as those of :class:`Method`; their tensors are at least float32 and may be changed in place by an update.
    """

    info: ClassVar[MethodInfo]
    passes: ClassVar[float] = 3.0
    """A forward pass, and a backward pass that counts as two more."""
    differentiates: ClassVar[bool] = True
    step_is_normalized: ClassVar[bool] = False
    default_lr: ClassVar[float | None] = None
    not_replayable: ClassVar[str] = "its gradients are not kept"

    @abstractmethod
    def state_bytes(self, blocks: Blocks) -> int:
        """Bytes of the tensors of the state."""

    def scratch_bytes(self, blocks: Blocks) -> int:
        """Bytes of all gradients, which a step holds at once."""
        return sum(block.numel * block.tensor.element_size() for block in blocks)

    @abstractmethod
    def init(self, blocks: Blocks) -> State:
        """State before the first step."""

    @abstractmethod
    def update_(
        self, theta: PerturbedParameters, state: State, gradients: MutableMapping[int, torch.Tensor], lr: Sequence[float]
    ) -> State:
        """Move theta against the gradients; the next state.

        Args:
            gradients: of each block by its index; a block that the loss does not reach has none. They are taken out
                one by one, so that each is freed as soon as it has been used.
            lr: learning rate of each block.
        """


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of running means over weights of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def accumulators(blocks: Blocks, shapes: Mapping[int, tuple[int, ...]] = MappingProxyType({})) -> tuple[torch.Tensor, ...]:
    """A tensor of zeros per block, at least float32, of its shape or the one that ``shapes`` has for its index."""
    templates = [block.tensor.detach() for block in blocks]
    templates = [x.new_empty(shapes[i]) if i in shapes else x for i, x in enumerate(templates)]
    return tuple(torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in templates)


def accumulator_bytes(blocks: Blocks, shapes: Mapping[int, tuple[int, ...]] = MappingProxyType({})) -> int:
    """Bytes of :func:`accumulators`."""
    sizes = [accumulation_dtype(block.tensor.dtype).itemsize for block in blocks]
    return sum(size * (math.prod(shapes[i]) if i in shapes else blocks[i].numel) for i, size in enumerate(sizes))


def key_since(key: Key, interval: int) -> Key:
    """Key of the last step that began an interval of steps: what stays for an interval is drawn by it."""
    return Key(key.seed, key.step - key.step % interval)


def descend(theta: PerturbedParameters, estimates: Sequence[Estimate], lr: Sequence[float]) -> None:
    """SGD along the directions of the estimates: ``theta_b -= lr_b * mean(projected gradient * u_b)``."""
    for estimate in estimates:
        weight = -estimate.projected_gradient / len(estimates)
        theta.add(estimate.direction, [weight * rate for rate in lr])


def two_point_in_update(theta: PerturbedParameters, closure: Closure, direction: Direction, epsilon: float) -> Estimate:
    """The two-point estimate by a closure of :class:`StepContext`, which evaluates the weights as they are perturbed."""
    theta.perturb(direction, epsilon)
    plus = finite_loss(closure)
    theta.perturb(direction, -epsilon)
    minus = finite_loss(closure)
    return Estimate(direction, plus, minus, (plus - minus) / (2 * epsilon))


def gradient(blocks: Blocks, index: int, estimates: Sequence[Estimate]) -> torch.Tensor:
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


def check_counts(least: int = 1, /, **values: int) -> None:
    """Raise ValueError, naming the first value that is not a whole number of at least ``least``."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value} must be a whole number, at least {least}")


def check_fractions(**values: float) -> None:
    """Raise ValueError, naming the first value that is not at least 0 and below 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be at least 0 and below 1")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError where ``value`` is not one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
