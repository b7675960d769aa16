"""Sparse MeZO: MeZO on small weights alone.

Liu et al. 2024, arXiv:2402.15751. The mask is 1 where |theta| <= h, with a threshold h for each tensor that is set
before training, and it is taken anew from the unperturbed weights at every step; perturbation and update go along mask * z.
Here ``sparsity`` is the fraction of weights that are left out, the largest ones, so that 0 is MeZO. Differs from the paper in
- keeping the step's mask as one bit per coordinate, where the paper makes it anew inside the forward pass: it must not
  depend on perturbed weights, and a block is perturbed while its noise is added,
- training blocks whose weights all have one magnitude (fresh biases, norms, adapters) whole: magnitudes rank nothing there.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

from l2l.methods.base import Block, Blocks, CustomEstimator, Direction, Estimates, Key, LossEvaluator, MethodInfo
from l2l.params.operators import Masked, Stored, packed, packed_bytes


@dataclass(frozen=True)
class SparseMeZOState:
    """The largest |weight| that moves, per block; infinite where all do."""

    thresholds: tuple[float, ...]


@final
@dataclass(frozen=True)
class SparseMeZO(CustomEstimator[SparseMeZOState]):
    """theta -= lr * g * mask * z, the mask being 1 where |theta| is small."""

    info: ClassVar = MethodInfo("Liu et al. 2024, arXiv:2402.15751", "0P; in a step 1 bit per weight")
    fixed_points: ClassVar = True
    fractions = ("sparsity",)
    sparsity: float = 0.8
    """Fraction of each block's weights that are too large to move, before the first step; 0 trains all weights."""

    def scratch_bytes(self, blocks: Blocks) -> int:
        # the masks of a step and of the one before
        return 2 * sum(packed_bytes(block.numel) for block in blocks) if self.sparsity else 0

    def init(self, blocks: Blocks) -> SparseMeZOState:
        return SparseMeZOState(tuple(self._threshold(block) for block in blocks))

    def _threshold(self, block: Block) -> float:
        if not self.sparsity or not block.numel:
            return math.inf
        magnitude = block.tensor.detach().abs().view(-1)
        if magnitude.min() == magnitude.max():
            return math.inf
        return magnitude.kthvalue(math.ceil(round((1 - self.sparsity) * len(magnitude), 6))).values.item()

    def direction(self, blocks: Blocks, state: SparseMeZOState, key: Key) -> Direction:
        """Reads the weights: they must be unperturbed."""
        limits = [(i, limit) for i, limit in enumerate(state.thresholds) if limit < math.inf]
        bits = {i: packed(blocks[i].tensor.detach().abs() <= limit) for i, limit in limits}
        return self.unit_direction(blocks, key, Masked(Stored(bits)) if bits else None)

    def estimate(self, evaluator: LossEvaluator, state: SparseMeZOState) -> tuple[Estimates, SparseMeZOState]:
        if self.sparsity:
            evaluator.theta.restore()
        first = self.direction(evaluator.theta.blocks, state, evaluator.key)
        directions = [replace(first, key=key) for key in evaluator.keys(self.num_directions)]
        return tuple(evaluator.two_point(direction, self.epsilon) for direction in directions), state
