"""TeZO: MeZO along sums of few matrices of rank one, of which only the weights change over time.

Sun et al. 2025, arXiv:2501.19057. A matrix [m, n] moves along U diag(tau) V^T / sqrt(r), U [m, r] and V [n, r] drawn once and
tau [r] at every step; other blocks along plain noise. Momentum and Adam act on tau: M and S are running means of g * tau and
of its square, and a matrix moves by U diag(M) V^T, with Adam over the root of (U * U) diag(S) (V * V)^T. Differs from the paper
in the factor 1 / sqrt(r), which makes a coordinate's mean square 1, in making U and V anew from their key instead of keeping
them, and in that a matrix's rank follows from its own spectrum, not from the least within a layer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from l2l.methods import base
from l2l.methods.base import Block, Blocks, Direction, Distribution, Estimates, Key, PerturbedParameters, StepContext
from l2l.params.operators import factor, matrices, product, sides, spectral_rank

_MEANS = {"sgd": 0, "momentum": 1, "adam": 2}


@dataclass(frozen=True)
class TeZOState:
    """The ranks, and the running means."""

    ranks: dict[int, int]
    """Of each matrix, by index of the block."""
    means: tuple[tuple[torch.Tensor, ...], ...]
    """Momentum of every block, and with Adam mean squares: [r] of matrices, of the block's shape otherwise."""


@final
class Fixed(base.DirectionOperator):
    """U diag(tau) V^T / sqrt(r) with U and V of the run's seed."""

    def __init__(self, ranks: dict[int, int], seed: int) -> None:
        self.ranks, self._key = ranks, Key(seed)

    def covers(self, index: int) -> bool:
        return index in self.ranks

    def sides(self, block: Block, index: int, distribution: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
        """U / sqrt(r) and V."""
        (m, n), r = sides(block), self.ranks[index]
        u = factor(block, "rows", self._key, (m, r), distribution).div_(math.sqrt(r))
        return u, factor(block, "columns", self._key, (n, r), distribution)

    def weights(self, block: Block, index: int, key: Key, distribution: Distribution) -> torch.Tensor:
        """tau [r]."""
        return factor(block, "weights", key, (self.ranks[index],), distribution)

    def mean_weights(self, block: Block, index: int, estimates: Estimates) -> torch.Tensor:
        """Mean of g * tau [r], tau as long as it was in the evaluation."""
        found = [(e.direction, e.projected_gradient / len(estimates)) for e in estimates]
        taus = [self.weights(block, index, u.key, u.distribution).mul_(u.factor * u.sigma[index] * g) for u, g in found]
        return torch.stack(taus).sum(0)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> torch.Tensor:
        u, v = self.sides(block, index, distribution)
        return product(u.mul_(self.weights(block, index, key, distribution)), v).view(block.tensor.shape)


@final
@dataclass(frozen=True)
class TeZO(base.Method[TeZOState]):
    """MeZO along fixed matrices of rank one with fresh weights."""

    info: ClassVar = base.MethodInfo(
        "Sun et al. 2025, arXiv:2501.19057", "0P; momentum r per matrix, 1P of vectors; Adam twice"
    )
    positive = ("delta",)
    counts = ("rank",)
    fractions = ("threshold",)
    rank: int = 64
    """Most rank of a matrix's direction."""
    threshold: float = 0.0
    """A matrix has at most the number of its singular values above this fraction of the largest, as it is before the
    first step; 0: ``rank`` everywhere."""
    rule: Literal["sgd", "momentum", "adam"] = "sgd"
    """How the estimates become a step."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of momentum and of the mean squares."""
    delta: float = 1e-8
    """Added to Adam's root."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice("rule", self.rule, tuple(_MEANS))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers, each at least 0 and below 1")
        object.__setattr__(self, "step_is_normalized", self.rule == "adam")
        object.__setattr__(self, "leaves_span", self.rule == "adam")

    def state_bytes(self, blocks: Blocks) -> int:
        """With a threshold at most: it may lower a rank."""
        shapes = {i: (self.rank,) for i in matrices(blocks)}
        return _MEANS[self.rule] * base.accumulator_bytes(blocks, shapes)

    def init(self, blocks: Blocks) -> TeZOState:
        ranks = {i: spectral_rank(blocks[i], self.rank, self.threshold) for i in sorted(matrices(blocks))}
        shapes = {i: (rank,) for i, rank in ranks.items()}
        return TeZOState(ranks, tuple(base.accumulators(blocks, shapes) for _ in range(_MEANS[self.rule])))

    def direction(self, blocks: Blocks, state: TeZOState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, Fixed(state.ranks, key.seed))

    def update_(self, theta: PerturbedParameters, state: TeZOState, estimates: Estimates, context: StepContext) -> TeZOState:
        if self.rule == "sgd":
            base.descend(theta, estimates, context.lr)
            return state
        blocks, shape = theta.blocks, Fixed(state.ranks, context.key.seed)

        def delta(index: int) -> torch.Tensor:
            block, means = blocks[index], [mean[index] for mean in state.means]
            low_rank = shape.covers(index)
            found = shape.mean_weights(block, index, estimates) if low_rank else base.gradient(blocks, index, estimates)
            values = zip(means, self.betas, (found, found * found), strict=False)
            following = [(mean * beta).add_(value, alpha=1 - beta) for mean, beta, value in values]
            moved = following
            if low_rank:
                u, v = shape.sides(block, index, self.distribution)
                moved = [product(u**power * mean, v**power) for power, mean in enumerate(following, 1)]
            step = moved[0] if len(moved) == 1 else moved[0] / moved[1].sqrt().add_(self.delta)
            for mean, value in zip(means, following, strict=True):  # last: what wants memory may fail
                mean.copy_(value)
            return step.view(block.tensor.shape)

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return state
