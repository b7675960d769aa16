"""The interface of meta-objectives: the state an objective is evaluated at, the loss it returns, the abstract objective."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from l2l.estimators import Closure
from l2l.methods.learned import Learned
from l2l.noise import Key
from l2l.optim import StepReport
from l2l.params import PerturbedParameters
from l2l.tuners.features import RunStatistics


@dataclass(frozen=True)
class SampledLoss:
    """A loss under labels drawn from the model itself: the mean over ``count`` independent labels. One gradient of it costs
    ``passes`` forward passes; a backward pass counts as two."""

    closure: Callable[[], Tensor]
    count: int
    passes: int


@dataclass(frozen=True)
class MemberLoss:
    """What a member of a population has come to."""

    loss: float
    passes: int
    """Forward passes spent."""


@dataclass(frozen=True)
class MetaState:
    """One point of the model's trajectory, seen through the batches of one task. Closures read the current parameters."""

    closure: Closure
    """Loss of batch A, on which the zeroth-order step is taken; with a graph where gradients are enabled."""
    other: Closure
    """Loss of batch B, drawn independently of A."""
    further: Callable[[int], Closure]
    """``further(i)`` is the loss of the i-th further batch, independent of A and B."""
    theta: PerturbedParameters
    method: Learned
    history: RunStatistics
    """Run statistics after the previous outer step on this task."""
    key: Key
    lr: float
    """Learning rate of the zeroth-order step."""
    consume: Callable[[int, Tensor], None] | None = None
    """Called with each block's index and a gradient of the model, so that the trajectory shares the backward pass."""
    sampled: Callable[[int], SampledLoss] | None = None
    """``sampled(i)`` is the loss of batch A under the i-th draw of labels from the model."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Objective state carried over from this task's previous outer step."""
    elsewhere: Callable[[int], list[MemberLoss]] | None = None
    """Evaluates so many members of a :class:`PopulationObjective` in other processes, in their order; None: in this one."""


@dataclass(frozen=True)
class MetaLoss:
    """What an objective returns. The parameters are as they were before."""

    surrogate: Tensor
    """Scalar whose gradient in the tuner's weights is the meta-gradient; its own value means nothing."""
    value: float
    """The objective, which the tuner is to make small."""
    loss: float
    """Loss of the model where the gradient given to ``consume`` was taken; without one, where the objective ends."""
    history: RunStatistics
    """Run statistics for this task's next outer step."""
    report: StepReport
    """The zeroth-order step at theta, as in fine-tuning; it has been undone."""
    passes: int
    """Forward passes spent; a backward pass counts as two."""
    sigma_gradient: Tensor | None = None
    """[blocks] float32: derivative of the objective in sigma before normalisation. None: not computed."""
    basis_gradient: Tensor | None = None
    """[blocks] float32: the same in basis_sigma, 0 for blocks without a basis. None: no basis."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Objective state carried to this task's next outer step."""


class Objective(ABC):
    """Abstract objective: a pure function of the state. Its fields are its settings."""

    hands_gradients: ClassVar[bool] = True
    """Whether ``consume`` is called. False for objectives without a backward pass."""

    @abstractmethod
    def __call__(self, point: MetaState) -> MetaLoss:
        """The objective at a state. FloatingPointError where a loss is not finite; theta is back where it was, as after any
        other error."""


class PopulationObjective(Objective):
    """Abstract objective that is made of independent runs from one theta, the members of a population, which other processes
    may evaluate: the result is the same to the last bit, wherever each of them was evaluated."""

    @property
    @abstractmethod
    def members(self) -> int:
        """How many there are."""

    @abstractmethod
    def member(self, point: MetaState, number: int) -> MemberLoss:
        """Evaluate a member: a pure function of the state and of its number. Afterwards, and after an error, model and tuner
        have the weights that they had, bit for bit."""

    @abstractmethod
    def combined(self, point: MetaState, found: Sequence[MemberLoss]) -> MetaLoss:
        """The objective from what its members have come to, in their order."""

    def __call__(self, point: MetaState) -> MetaLoss:
        if point.elsewhere is not None:
            return self.combined(point, point.elsewhere(self.members))
        return self.combined(point, [self.member(point, number) for number in range(self.members)])
