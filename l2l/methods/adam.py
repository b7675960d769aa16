"""ZO-Adam: Adam on the estimates, by the rule of ``torch.optim.Adam``.

Zhang et al. 2024, arXiv:2402.11592; Kingma and Ba 2015, arXiv:1412.6980. Differs from the benchmark's code in that
the estimates of a block live only while that block is updated, and all blocks take one step of one optimizer (the code calls
a step of the whole optimizer for every tensor); and from ZO-AdaMM, arXiv:1910.06513, in having bias correction and no
running maximum. With both betas 0 and a tiny ``eps`` it is the element-wise sign of the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import Method, MethodInfo, StepContext, accumulation_dtype, check_counts, check_positive, gradient
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks


@dataclass(frozen=True)
class AdamState:
    """Running means of the estimates and of their squares, a tensor each per block, and how many steps they hold."""

    steps: int
    mean: tuple[Tensor, ...]
    square: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Adam(Method[AdamState]):
    """Adam on MeZO's estimates. Extra memory: two copies, at least float32."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592 (ZO-Adam)", "2P")
    step_is_normalized = True
    leaves_span = True
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    beta1: float = 0.9
    """What the mean of the estimates keeps of itself at each step."""
    beta2: float = 0.999
    """What the mean of their squares keeps."""
    eps: float = 1e-8
    """Added to the root of the mean square."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon, eps=self.eps)
        check_counts(num_directions=self.num_directions)
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return 2 * sum(block.numel * accumulation_dtype(block.tensor.dtype).itemsize for block in blocks)

    def init(self, blocks: Blocks) -> AdamState:
        def zeros() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros_like(block.tensor, dtype=accumulation_dtype(block.tensor.dtype)) for block in blocks
            )

        return AdamState(0, zeros(), zeros())

    def direction(self, blocks: Blocks, state: AdamState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def update_(
        self, theta: PerturbedParameters, state: AdamState, estimates: Sequence[Estimate], context: StepContext
    ) -> AdamState:
        steps = state.steps + 1
        unbias_mean = 1 - self.beta1**steps
        unbias_root = math.sqrt(1 - self.beta2**steps)

        def delta(index: int) -> Tensor:
            found = gradient(theta.blocks, index, estimates)
            mean = state.mean[index].lerp_(found, 1 - self.beta1)
            square = state.square[index].mul_(self.beta2).addcmul_(found, found, value=1 - self.beta2)
            return mean / square.sqrt().div_(unbias_root).add_(self.eps)

        theta.add_dense_each(delta, [-rate / unbias_mean for rate in context.lr])
        return replace(state, steps=steps)
