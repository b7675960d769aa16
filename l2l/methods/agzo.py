"""AGZO: MeZO along directions in the span of what each linear map is given.

Lin et al. 2026, arXiv:2601.17261. The pass at theta also shows the inputs of every linear map with a matrix [m, n] as weight;
a power iteration from random noise gives an orthonormal basis A [n, r] of their dominant span, and the matrix moves along
sqrt(n / r) R A^T with R [m, r] fresh noise, all others along plain noise: g = (L(theta + epsilon u) - L(theta)) / epsilon.
Outside that span a matrix has no gradient. Differs from the paper in the factor sqrt(n / r), which makes a coordinate's
mean square 1, as it is where a block moves along plain noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    MethodInfo,
    StepContext,
    accumulation_dtype,
    check_counts,
    check_positive,
    descend,
)
from l2l.noise import Distribution, Key
from l2l.params import Direction, DirectionOperator, PerturbedParameters
from l2l.params.blocks import Block, Blocks
from l2l.params.inputs import Activations, Span
from l2l.params.operators import factor, product


@final
class InSpan(DirectionOperator):
    """sqrt(n / r) R A^T; where inputs meet a matrix's rows, sqrt(m / r) A R^T."""

    def __init__(self, spans: dict[int, Span]) -> None:
        self._spans = spans

    def covers(self, index: int) -> bool:
        return index in self._spans

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> Tensor:
        span = self._spans[index]
        width, rank = span.vectors.shape
        form = (block.numel // width, rank)
        noise = factor(block, "outputs", key, form, distribution).mul_(math.sqrt(width / rank))
        return product(span.vectors, noise) if span.over_rows else product(noise, span.vectors)


@final
@dataclass(frozen=True)
class AGZO(CustomEstimator[None]):
    """One-sided steps in the span of what each linear map is given. Extra memory: r numbers per column."""

    info: ClassVar = MethodInfo("Lin et al. 2026, arXiv:2601.17261", "r per column of a matrix, of one step")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    rank: int = 1
    """Of a matrix's direction; of one with shorter inputs, their length."""
    iterations: int = 3
    """Of the power iteration."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(num_directions=self.num_directions, rank=self.rank, iterations=self.iterations)

    @property
    def passes(self) -> float:
        return 1.0 + self.num_directions

    def state_bytes(self, blocks: Blocks) -> int:
        wide = [block for block in blocks if block.tensor.ndim == 2]
        lengths = [max(block.tensor.shape) for block in wide]
        return sum(
            2 * min(self.rank, n) * n * accumulation_dtype(b.tensor.dtype).itemsize
            for b, n in zip(wide, lengths, strict=True)
        )

    def init(self, blocks: Blocks) -> None:
        return None

    def direction(self, blocks: Blocks, state: None, key: Key) -> Direction:
        """Plain noise: where it is to be bent, only a look shows."""
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[tuple[Estimate, ...], None]:
        blocks, theta = evaluator.theta.blocks, evaluator.theta
        watching = Activations(blocks, self.rank, self.iterations, evaluator.key)
        watched = replace(evaluator, closure=lambda: watching.during(evaluator.closure))
        plain = [self.direction(blocks, state, evaluator.key.with_draw(draw)) for draw in range(self.num_directions)]
        # Half precision is read as the copies that looks make: norms and biases are float32 on both sides then.
        home = watched.center() if theta.update is None else watched.along(plain[0], 0.0)
        shape = InSpan(watching.spans) if watching.spans else None
        return evaluator.one_sided([replace(one, shape=shape) for one in plain], self.epsilon, home), state

    def update_(
        self, theta: PerturbedParameters, state: None, estimates: Sequence[Estimate], context: StepContext
    ) -> None:
        descend(theta, estimates, context.lr)
