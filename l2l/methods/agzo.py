"""AGZO: MeZO along directions in the span of the inputs of each linear map.

Lin et al. 2026, arXiv:2601.17261. The pass at theta also observes the inputs of every linear map with a matrix [m, n] as
weight; a power iteration from random noise gives an orthonormal basis A [n, r] of their dominant span, and the matrix moves
along sqrt(n / r) R A^T with R [m, r] fresh noise, all other blocks along plain noise: g = (L(theta + epsilon u) - L(theta))
/ epsilon. Outside that span a matrix has no gradient. Differs from the paper in the factor sqrt(n / r), which makes a
coordinate's mean square 1, as it is where a block moves along plain noise.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from l2l.methods import base
from l2l.methods.base import Block, Blocks, DirectionOperator, Distribution, Estimates, Key, LossEvaluator
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
class AGZO(base.CustomEstimator[None]):
    """One-sided steps in the span of the inputs of each linear map."""

    info: ClassVar = base.MethodInfo("Lin et al. 2026, arXiv:2601.17261", "0P; in a step r per column of a matrix")
    not_replayable = "its directions are made of activations"
    counts = ("rank", "iterations")
    rank: int = 1
    """Rank of a matrix's direction, at most the length of its inputs."""
    iterations: int = 3
    """Of the power iteration."""

    @property
    def passes(self) -> float:
        return 1.0 + self.num_directions

    def scratch_bytes(self, blocks: Blocks) -> int:
        # the spans of a step and of the one before, whichever side of a matrix its inputs meet
        wide = [(max(b.tensor.shape), base.accumulation_dtype(b.tensor.dtype)) for b in blocks if b.tensor.ndim == 2]
        return sum(2 * min(self.rank, n) * n * dtype.itemsize for n, dtype in wide)

    def estimate(self, evaluator: LossEvaluator, state: None) -> tuple[Estimates, None]:
        theta = evaluator.theta
        watching = Activations(theta.blocks, self.rank, self.iterations, evaluator.key)
        noise = base.directions_of(self, evaluator, state)
        loss_center = evaluator.watched_center(watching.during, noise[0])
        shape = InSpan(watching.spans) if watching.spans else None
        directions = [replace(direction, shape=shape) for direction in noise]
        return evaluator.one_sided(directions, self.epsilon, loss_center), state
