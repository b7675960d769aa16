"""What every objective is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from l2l.estimators.finite_difference import Closure
from l2l.meta.labels import SampledLoss
from l2l.methods.learned import Learned
from l2l.noise import Key
from l2l.optim import StepReport
from l2l.params import PerturbedParameters
from l2l.tuners.features import RunStatistics


@dataclass(frozen=True)
class MetaState:
    """A place on the trajectory at which the tuner is to learn something. Closures are losses where theta stands."""

    closure: Closure
    """Loss of batch A, on which the step is taken; with a graph where gradients are enabled."""
    other: Closure
    """Loss of batch B, drawn independently of A."""
    further: Callable[[int], Closure]
    """``further(i)`` is the loss of the i-th further batch, independent of both."""
    theta: PerturbedParameters
    method: Learned
    """The method with the tuner as it is now."""
    history: RunStatistics
    """What the last point on this task left behind."""
    key: Key
    lr: float
    """Learning rate of the inner step."""
    consume: Callable[[int, Tensor], None] | None = None
    """Called with each block's index and one gradient of the model, for whoever can use a backward pass too."""
    sampled: Callable[[int], SampledLoss] | None = None
    """``sampled(i)`` is the loss of batch A under labels that the model draws itself, each time others."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the objective itself remembered at the last point on this task."""


@dataclass(frozen=True)
class MetaLoss:
    """What an objective found at a point. Theta is where it was."""

    surrogate: Tensor
    """Scalar whose gradient in the tuner's weights is the meta-gradient; its own value means nothing."""
    value: float
    """The objective at this point: what the tuner is to make small."""
    loss: float
    """Loss of the model where the gradient that went to ``consume`` was taken; without one, where the objective ends."""
    features: Tensor
    """[blocks, features] that the tuner saw at theta."""
    history: RunStatistics
    """What the next point on this task is to remember."""
    report: StepReport
    """The deployed step at theta, as in fine-tuning; it was taken back."""
    passes: int
    """Forward passes spent; a backward pass counts as two."""
    sigma_gradient: Tensor | None = None
    """[blocks] float32: derivative of the objective in sigma before normalisation. None where no such thing is found."""
    basis_gradient: Tensor | None = None
    """[blocks] float32: the same in basis_sigma, 0 for blocks without a basis. None where there is no basis."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the objective is to be given again at the next point on this task."""


class Objective(ABC):
    """Abstract objective: a pure function of the point. Its fields are its settings; what it remembers is handed on."""

    hands_gradients: ClassVar[bool] = True
    """Whether ``consume`` is called: an objective without a backward pass has nothing for it."""

    @abstractmethod
    def __call__(self, point: MetaState) -> MetaLoss:
        """The objective at a point.

        Raises:
            FloatingPointError: a loss is not finite; theta is back where it was, as after any other error.
        """
