"""SubZero+: many one-sided queries in the subspaces of SubZero, and Adam on the small matrices between their factors.

Yu et al. 2026, arXiv:2608.15665, Algorithm 3. In subspaces U [m, r], V [n, r] of every matrix, redrawn every ``interval``
steps, K directions U Z_k V^T share one loss at theta (Equations 4 to 6). M and S are running means of mean(g_k Z_k) [r, r] and
of its square, and theta -= lr U (M / (sqrt(S) + eps)) V^T, both means unbiased (Equations 7 to 10). Columns of U and V get
the signs that make them Haar-distributed (Equation 11). The means go on where subspaces are redrawn, as in the paper.
Differs from the paper in
- the factor sqrt(m n) / r of :mod:`l2l.methods.subzero`, in direction and step: a coordinate's mean square is 1 in the one, and
  about lr^2 in the other, as Adam's is. The lr of the paper is lr * sqrt(m n) / r of this one, for each matrix its own;
- blocks that are no matrices, of which it says nothing: plain noise and Adam on their coordinates.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.methods import base
from l2l.methods.adam import AdamState, adam_step_
from l2l.methods.base import Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.methods.subzero import InSubspace, SubZeroState, folded, sample_subspaces, subspace_bytes
from l2l.params.operators import matrices


@dataclass(frozen=True)
class SubZeroPlusState:
    """The subspaces in use, and Adam's means in them: [r, r] of matrices, of the block's shape otherwise."""

    drawn: SubZeroState
    adam: AdamState


@final
@dataclass(frozen=True)
class SubZeroPlus(base.CustomEstimator[SubZeroPlusState]):
    """Adam on many one-sided estimates inside a small subspace of every matrix."""

    info: ClassVar = base.MethodInfo(
        "Yu et al. 2026, arXiv:2608.15665, Algorithm 3", "r per row and column and 2 r^2 of a matrix, 2P of vectors"
    )
    fixed_points: ClassVar = True
    step_is_normalized = True
    leaves_span = True
    positive = ("eps",)
    counts = ("rank", "interval")
    fractions = ("beta1", "beta2")
    num_directions: int = 99
    """Queries of a step, K. By the paper's ablation, fewer than 20 to 30 do not train."""
    rank: int = 24
    """Rank of a matrix's subspace on either side."""
    interval: int = 50
    """Steps that share a subspace."""
    beta1: float = 0.9
    """Decay of the mean of the estimates."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the mean square."""

    @property
    def passes(self) -> float:
        return self.num_directions + 1.0

    def _mean_shapes(self, blocks: Blocks) -> dict[int, tuple[int, ...]]:
        return {i: (min(self.rank, *folded(blocks[i], self.rank)),) * 2 for i in matrices(blocks)}

    def state_bytes(self, blocks: Blocks) -> int:
        return subspace_bytes(blocks, self.rank) + 2 * base.accumulator_bytes(blocks, self._mean_shapes(blocks))

    def init(self, blocks: Blocks) -> SubZeroPlusState:
        mean, square = (base.accumulators(blocks, self._mean_shapes(blocks)) for _ in range(2))
        return SubZeroPlusState(SubZeroState({}, -1), AdamState(0, mean, square))

    def direction(self, blocks: Blocks, state: SubZeroPlusState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, InSubspace(self._drawn(blocks, state, key).subspaces))

    def _drawn(self, blocks: Blocks, state: SubZeroPlusState, key: Key) -> SubZeroState:
        """The subspaces of the key's step: those of the state, or fresh ones."""
        since = base.key_since(key, self.interval)
        if since.step == state.drawn.since:
            return state.drawn
        return SubZeroState(sample_subspaces(blocks, self.rank, since, haar), since.step)

    def estimate(self, evaluator: LossEvaluator, state: SubZeroPlusState) -> tuple[Estimates, SubZeroPlusState]:
        state = replace(state, drawn=self._drawn(evaluator.theta.blocks, state, evaluator.key))  # once for all directions
        return evaluator.one_sided(base.directions_of(self, evaluator, state), self.epsilon), state

    def update_(
        self, theta: PerturbedParameters, state: SubZeroPlusState, estimates: Estimates, context: StepContext
    ) -> SubZeroPlusState:
        blocks, shape, adam = theta.blocks, InSubspace(state.drawn.subspaces), state.adam

        def delta(index: int) -> Tensor:
            block = blocks[index]
            if not shape.covers(index):
                return adam_step_(self, adam, index, base.gradient(blocks, index, estimates))
            found = torch.zeros_like(adam.mean[index])
            for estimate in estimates:  # mean of g Z, Z as long as it was in the evaluation
                u = estimate.direction
                weight = estimate.projected_gradient / len(estimates) * u.factor * u.sigma[index]
                found.add_(shape.core(block, index, u.key, u.distribution), alpha=weight)
            return shape.expand_(adam_step_(self, adam, index, found), block, index)

        theta.add_dense_each(delta, [-rate / (1 - self.beta1 ** (adam.steps + 1)) for rate in context.lr])
        return replace(state, adam=replace(adam, steps=adam.steps + 1))


def haar(matrix: Tensor) -> Tensor:
    """Orthonormal columns [n, r] that span those of Gaussian noise [n, r], as likely as any others that do: those of its QR
    decomposition with a positive diagonal of R."""
    with torch.no_grad():
        q, r = torch.linalg.qr(matrix)
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
