"""Sparse MeZO: MeZO on small weights alone.

Liu et al. 2024, arXiv:2402.15751. The mask is 1 where |theta| <= h, with a threshold h for each tensor that is set
before training, and it is taken anew from the unperturbed weights at every step; perturbation and update go along mask * z.
Here ``sparsity`` is the share of weights that are left out, the largest ones, so that 0 is MeZO. Differs from the paper in
- keeping the step's mask as one bit per coordinate, where the paper makes it anew inside the forward pass: it must not
  depend on weights that are perturbed, and theta is between places whenever a block is walked,
- training blocks whose weights are all of one size (fresh biases, norms, adapters) whole: their size ranks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    MethodInfo,
    StepContext,
    check_counts,
    check_positive,
    descend,
)
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Block, Blocks
from l2l.params.operators import Masked, Stored, packed, packed_bytes


@dataclass(frozen=True)
class SparseMeZOState:
    """How large a weight may be to move, per block; infinite where all do."""

    thresholds: tuple[float, ...]


@final
@dataclass(frozen=True)
class SparseMeZO(CustomEstimator[SparseMeZOState]):
    """theta -= lr * g * mask * z, the mask being 1 where |theta| is small. Extra memory: a bit per weight."""

    info: ClassVar = MethodInfo("Liu et al. 2024, arXiv:2402.15751", "1 bit per weight, of one step")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    sparsity: float = 0.8
    """Share of each block's weights that are too large to move, before the first step."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be at least 0 and below 1: 0 trains all weights")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(packed_bytes(block.numel) for block in blocks) if self.sparsity else 0

    def init(self, blocks: Blocks) -> SparseMeZOState:
        return SparseMeZOState(tuple(self._threshold(block) for block in blocks))

    def _threshold(self, block: Block) -> float:
        if not self.sparsity or not block.numel:
            return math.inf
        size = _size(block).view(-1)
        if size.min() == size.max():
            return math.inf
        return size.kthvalue(math.ceil(round((1 - self.sparsity) * len(size), 6))).values.item()

    def direction(self, blocks: Blocks, state: SparseMeZOState, key: Key) -> Direction:
        """By the weights as they stand: theta must be at home."""
        limits = [(i, limit) for i, limit in enumerate(state.thresholds) if limit < math.inf]
        bits = {i: packed(_size(blocks[i]) <= limit) for i, limit in limits}
        return Direction(key, (1.0,) * len(blocks), self.distribution, shape=Masked(Stored(bits)) if bits else None)

    def estimate(
        self, evaluator: LossEvaluator, state: SparseMeZOState
    ) -> tuple[tuple[Estimate, ...], SparseMeZOState]:
        if self.sparsity:
            evaluator.theta.restore()
        first = self.direction(evaluator.theta.blocks, state, evaluator.key)
        keys = [evaluator.key.with_draw(draw) for draw in range(self.num_directions)]
        directions = [Direction(key, first.sigma, self.distribution, shape=first.shape) for key in keys]
        return tuple(evaluator.two_point(direction, self.epsilon) for direction in directions), state

    def update_(
        self, theta: PerturbedParameters, state: SparseMeZOState, estimates: Sequence[Estimate], context: StepContext
    ) -> SparseMeZOState:
        descend(theta, estimates, context.lr)
        return state


def _size(block: Block) -> Tensor:
    return block.tensor.detach().abs()
