"""SGD with backpropagation, with or without momentum: a first-order baseline, by the rule of ``torch.optim.SGD``.

It is no zeroth-order method. Each step costs a forward and a backward pass and the memory of both. Differs from
``torch.optim.SGD`` in that weight decay, as everywhere here, is decoupled and leaves blocks of one dimension alone.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.methods.base import FirstOrder, MethodInfo, accumulation_dtype
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks


@dataclass(frozen=True)
class SGDState:
    """Running sums of past gradients, one tensor per block; none without momentum."""

    momentum: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class SGD(FirstOrder[SGDState]):
    """theta -= lr * gradient, by backpropagation. Extra memory: the gradients, and a float32 copy with momentum."""

    info: ClassVar = MethodInfo("torch.optim.SGD, by backpropagation", "the gradients; 1P with momentum")
    momentum: float = 0.0
    """What the sum of past gradients keeps of itself at each step; 0 keeps no sum."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")

    @property
    def copies(self) -> int:
        return 1 if self.momentum else 0

    def init(self, blocks: Blocks) -> SGDState:
        kept = blocks if self.momentum else ()
        return SGDState(
            tuple(torch.zeros_like(block.tensor, dtype=accumulation_dtype(block.tensor.dtype)) for block in kept)
        )

    def update_(
        self, theta: PerturbedParameters, state: SGDState, gradients: MutableMapping[int, Tensor], lr: Sequence[float]
    ) -> SGDState:
        for index in sorted(gradients):
            gradient = gradients.pop(index)
            if self.momentum:
                gradient = state.momentum[index].mul_(self.momentum).add_(gradient)
            theta.add_dense({index: gradient}, -lr[index])
        return state
