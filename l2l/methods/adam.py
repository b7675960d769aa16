"""ZO-Adam: Adam on the estimates, by the rule of ``torch.optim.Adam``.

Zhang et al. 2024, arXiv:2402.11592; Kingma and Ba 2015, arXiv:1412.6980. Differs from the benchmark's code in that
the estimates of a block live only while that block is updated, and all blocks take one step of one optimizer (the code calls
a step of the whole optimizer for every tensor); and from ZO-AdaMM, arXiv:1910.06513, in having bias correction and no
running maximum. With both betas 0 and a tiny ``eps`` it is the element-wise sign of the estimate.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from l2l.methods.base import Blocks, Estimates, Method, MethodInfo, PerturbedParameters, StepContext, accumulators, gradient


@dataclass(frozen=True)
class AdamState:
    """Running means of gradients and of their squares, a tensor each per block, and how many steps they hold."""

    steps: int
    mean: tuple[Tensor, ...]
    square: tuple[Tensor, ...]


def adam_step_(rule: Any, state: AdamState, index: int, found: Tensor) -> Tensor:
    """Update the means of a block, in place, with its gradient; what it moves by per lr / (1 - beta1^(steps + 1))."""
    out = torch.empty_like(found)  # before anything changes: what wants memory may fail
    mean = state.mean[index].lerp_(found, 1 - rule.beta1)
    square = state.square[index].mul_(rule.beta2).addcmul_(found, found, value=1 - rule.beta2)
    root = torch.sqrt(square, out=out).div_(math.sqrt(1 - rule.beta2 ** (state.steps + 1))).add_(rule.eps)
    return torch.div(mean, root, out=out)


@final
@dataclass(frozen=True)
class Adam(Method[AdamState]):
    """Adam on MeZO's estimates."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592 (ZO-Adam)", "2P, at least float32")
    accumulates = 2
    positive = ("eps",)
    fractions = ("beta1", "beta2")
    step_is_normalized = True
    leaves_span = True
    beta1: float = 0.9
    """Decay of the mean of the estimates."""
    beta2: float = 0.999
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the mean square."""

    def init(self, blocks: Blocks) -> AdamState:
        return AdamState(0, accumulators(blocks), accumulators(blocks))

    def update_(self, theta: PerturbedParameters, state: AdamState, estimates: Estimates, context: StepContext) -> AdamState:
        scales = [-rate / (1 - self.beta1 ** (state.steps + 1)) for rate in context.lr]  # unbiased means
        theta.add_dense_each(lambda i: adam_step_(self, state, i, gradient(theta.blocks, i, estimates)), scales)
        return replace(state, steps=state.steps + 1)
