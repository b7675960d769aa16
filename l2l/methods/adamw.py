"""AdamW with backpropagation: a first-order baseline, by the rule of ``torch.optim.AdamW``.

Loshchilov and Hutter 2019, arXiv:1711.05101. It is no zeroth-order method. Each step costs a forward and a backward pass
and the memory of both. Differs from ``torch.optim.AdamW`` in that weight decay leaves blocks of one dimension alone.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.methods.base import FirstOrder, MethodInfo, accumulation_dtype, check_positive
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks


@dataclass(frozen=True)
class AdamWState:
    """Running means of gradients and of their squares, a tensor each per block, and how many steps they hold."""

    steps: int
    mean: tuple[Tensor, ...]
    square: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class AdamW(FirstOrder[AdamWState]):
    """Adam with decoupled weight decay, by backpropagation. Extra memory: the gradients and two float32 copies."""

    info: ClassVar = MethodInfo("Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2", "the gradients, and 2P")
    beta1: float = 0.9
    """What the mean of gradients keeps of itself at each step."""
    beta2: float = 0.999
    """What the mean of their squares keeps."""
    eps: float = 1e-8
    """Added to the root of the mean square, so that a block without gradient stands still."""

    def __post_init__(self) -> None:
        check_positive(eps=self.eps)
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")

    @property
    def copies(self) -> int:
        return 2

    def init(self, blocks: Blocks) -> AdamWState:
        def zeros() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros_like(block.tensor, dtype=accumulation_dtype(block.tensor.dtype)) for block in blocks
            )

        return AdamWState(0, zeros(), zeros())

    def update_(
        self, theta: PerturbedParameters, state: AdamWState, gradients: MutableMapping[int, Tensor], lr: Sequence[float]
    ) -> AdamWState:
        steps = state.steps + 1
        unbias_mean = 1 - self.beta1**steps
        unbias_root = math.sqrt(1 - self.beta2**steps)
        for index in sorted(gradients):
            gradient = gradients.pop(index).to(state.mean[index].dtype)
            mean = state.mean[index].lerp_(gradient, 1 - self.beta1)
            square = state.square[index].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            root = square.sqrt().div_(unbias_root).add_(self.eps)
            theta.add_dense({index: mean / root}, -lr[index] / unbias_mean)
        return replace(state, steps=steps)
