"""ZO-SGD-MMT: MeZO whose estimates gather momentum.

Zhang et al. 2024, arXiv:2402.11592. The convention is that of ``torch.optim.SGD`` without dampening or Nesterov:
buffer = momentum * buffer + g * u, theta -= lr * buffer, with a buffer of zeros before the first step. Steps are therefore
1 / (1 - momentum) times as long as MeZO's once the buffer has filled; momentum 0 is MeZO.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from l2l.methods.base import Blocks, Estimates, Method, MethodInfo, PerturbedParameters, StepContext, accumulators, gradient


@dataclass(frozen=True)
class MomentumState:
    """A tensor per block."""

    buffer: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Momentum(Method[MomentumState]):
    """SGD with momentum on MeZO's estimates."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592 (ZO-SGD-MMT)", "1P, at least float32")
    accumulates = 1
    fractions = ("momentum",)
    momentum: float = 0.9
    """Decay of the buffer."""

    def init(self, blocks: Blocks) -> MomentumState:
        return MomentumState(accumulators(blocks))

    def update_(
        self, theta: PerturbedParameters, state: MomentumState, estimates: Estimates, context: StepContext
    ) -> MomentumState:
        def delta(index: int) -> Tensor:
            found = gradient(theta.blocks, index, estimates)  # before the buffer changes: what wants memory may fail
            return state.buffer[index].mul_(self.momentum).add_(found)

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return state
