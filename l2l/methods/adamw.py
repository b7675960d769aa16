"""AdamW with backpropagation: a first-order baseline, by the rule of ``torch.optim.AdamW``.

Loshchilov and Hutter 2019, arXiv:1711.05101. It is no zeroth-order method: each step costs a forward and a backward pass
and the memory of both. Differs from ``torch.optim.AdamW`` in that weight decay leaves blocks of one dimension alone.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from l2l.methods import base
from l2l.methods.adam import AdamState, adam_step_
from l2l.methods.base import Blocks, PerturbedParameters


@final
@dataclass(frozen=True)
class AdamW(base.FirstOrder[AdamState]):
    """Adam with decoupled weight decay, by backpropagation."""

    info: ClassVar = base.MethodInfo(
        "Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2", "2P, at least float32; the gradients in a step"
    )
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the mean square, so that a block without gradient stays where it is."""

    def __post_init__(self) -> None:
        base.check_positive(eps=self.eps)
        base.check_fractions(beta1=self.beta1, beta2=self.beta2)

    def state_bytes(self, blocks: Blocks) -> int:
        return 2 * base.accumulator_bytes(blocks)

    def init(self, blocks: Blocks) -> AdamState:
        return AdamState(0, base.accumulators(blocks), base.accumulators(blocks))

    def update_(
        self, theta: PerturbedParameters, state: AdamState, gradients: MutableMapping[int, Tensor], lr: Sequence[float]
    ) -> AdamState:
        def delta(index: int) -> Tensor:
            moved = adam_step_(self, state, index, gradients[index].to(state.mean[index].dtype))
            del gradients[index]
            return moved

        unbiased = 1 - self.beta1 ** (state.steps + 1)
        theta.add_dense_each(delta, {index: -lr[index] / unbiased for index in sorted(gradients)})
        return replace(state, steps=state.steps + 1)
