"""SGD with backpropagation, with or without momentum: a first-order baseline, by the rule of ``torch.optim.SGD``.

It is no zeroth-order method: each step costs a forward and a backward pass and the memory of both. Differs from
``torch.optim.SGD`` in that weight decay, as everywhere here, is decoupled and leaves blocks of one dimension alone.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from l2l.methods import base
from l2l.methods.base import Blocks, PerturbedParameters


@dataclass(frozen=True)
class SGDState:
    """Decaying sums of past gradients, one tensor per block; none without momentum."""

    momentum: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class SGD(base.FirstOrder[SGDState]):
    """theta -= lr * gradient, by backpropagation."""

    info: ClassVar = base.MethodInfo("torch.optim.SGD, by backpropagation", "0P, 1P with momentum; the gradients in a step")
    momentum: float = 0.0
    """Decay of the sum of past gradients; 0 keeps no sum."""

    def __post_init__(self) -> None:
        base.check_fractions(momentum=self.momentum)

    def state_bytes(self, blocks: Blocks) -> int:
        return base.accumulator_bytes(blocks) if self.momentum else 0

    def init(self, blocks: Blocks) -> SGDState:
        return SGDState(base.accumulators(blocks) if self.momentum else ())

    def update_(
        self, theta: PerturbedParameters, state: SGDState, gradients: MutableMapping[int, Tensor], lr: Sequence[float]
    ) -> SGDState:
        def delta(index: int) -> Tensor:
            gradient = gradients.pop(index)
            return state.momentum[index].mul_(self.momentum).add_(gradient) if self.momentum else gradient

        theta.add_dense_each(delta, {index: -lr[index] for index in sorted(gradients)})
        return state
