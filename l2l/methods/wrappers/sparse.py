"""A mask around any method: some coordinates are neither perturbed nor updated. ``sparse+mezo``, ``sparse+learned+lozo``.

Zhang et al. 2024 (ZO-Bench), arXiv:2402.11592, gradient sparsity. The mask multiplies whatever the method looks along. Differs
from the released code in that
- a random mask has the share of zeros that it is asked for: the code compares normal noise with s, which zeroes Phi(s)
  (69 % where half is asked for),
- ``magnitude`` and ``wanda`` (the weight times the norm of its inputs, Sun et al. 2023, arXiv:2306.11695) choose
  coordinates; the code uses sizes for the shares of random masks alone (here ``scope="global"``) and never scores by inputs.
Directions are not scaled up for the coordinates that stay, there nor here. What a method remembers (momentum, running means)
moves no coordinate that stays either."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    Method,
    MethodInfo,
    StepContext,
    accumulation_dtype,
    check_counts,
    run_estimator,
)
from l2l.noise import Key
from l2l.params import Direction, DirectionOperator, PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.params.inputs import InputNorms
from l2l.params.operators import Drawn, Mask, Masked, Stored, largest, packed, packed_bytes

SAMPLE = 10**7
"""Most weights of which a quantile over all blocks is taken; of larger models, every n-th."""


@dataclass(frozen=True)
class SparseState:
    """That of the method, and which coordinates stay."""

    inner: Any
    shares: tuple[float, ...]
    """Of each block, how many of its coordinates."""
    bits: dict[int, Tensor]
    """Which ones move, where that is not drawn: one bit each, by index of the block."""


@final
@dataclass(frozen=True)
class Sparse(CustomEstimator[SparseState]):
    """Some coordinates stay where they are, under another method. Extra memory: none, or a bit per weight."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592", "0P; by magnitude or wanda, 1 bit per weight")
    inner: Method[Any]
    kind: Literal["random", "magnitude", "wanda"] = "random"
    """Which stay: drawn by the key; by |theta|; or by |theta| times the norm of its inputs, for a pass more per mask."""
    sparsity: float = 0.5
    """Share of the coordinates that stay."""
    interval: int = 1
    """Steps that share a mask."""
    scope: Literal["block", "global"] = "block"
    """Whether every block has this share, or the smallest weights of all blocks together say which has how much."""
    keep: Literal["largest", "smallest"] = "largest"
    """Which scores go on moving, of magnitude and wanda."""
    epsilon: float = field(init=False)
    num_directions: int = field(init=False)

    def __post_init__(self) -> None:
        check_counts(interval=self.interval)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be at least 0 and below 1: 0 leaves every coordinate in")
        for name, known in (("kind", ("random", "magnitude", "wanda")), ("scope", ("block", "global"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.keep not in ("largest", "smallest"):
            raise ValueError(f"keep={self.keep!r} must be largest or smallest")
        for name in ("epsilon", "num_directions", "step_is_normalized", "leaves_span", "differentiates"):
            object.__setattr__(self, name, getattr(self.inner, name))

    @property
    def passes(self) -> float:
        return self.inner.passes + (1 / self.interval if self.kind == "wanda" and self.sparsity else 0)

    @property
    def passes_once(self) -> float:
        return self.inner.passes_once

    @property
    def _scored(self) -> bool:
        return self.kind != "random" and self.sparsity > 0

    @property
    def _inverted(self) -> bool:
        return self._scored and self.keep == "smallest"

    def state_bytes(self, blocks: Blocks) -> int:
        return self.inner.state_bytes(blocks) + (sum(packed_bytes(b.numel) for b in blocks) if self._scored else 0)

    def init(self, blocks: Blocks) -> SparseState:
        shares = (self.sparsity,) * len(blocks)
        if self.scope == "global" and self.sparsity:
            small = global_shares(blocks, 1 - self.sparsity if self._inverted else self.sparsity)
            shares = tuple(1 - share for share in small) if self._inverted else small
        return SparseState(self.inner.init(blocks), shares, {})

    def direction(self, blocks: Blocks, state: SparseState, key: Key) -> Direction:
        return self._masking(state)(self.inner.direction(blocks, state.inner, key))

    def _masking(self, state: SparseState) -> Callable[[Direction], Direction]:
        """Masks directions; of those with one shape, with one shape again."""
        known: dict[tuple[DirectionOperator | None, Key], Masked] = {}

        def mask(direction: Direction) -> Direction:
            since, shape = self._since(direction.key), direction.shape
            return replace(direction, shape=known.setdefault((shape, since), Masked(self._mask(state, since), shape)))

        return mask if self.sparsity else lambda direction: direction

    def _since(self, key: Key) -> Key:
        """Of the step that chose the coordinates."""
        return Key(key.seed, key.step - key.step % self.interval)

    def _mask(self, state: SparseState, since: Key) -> Mask:
        return Stored(state.bits) if self._scored else Drawn(since, state.shares)

    def estimate(self, evaluator: LossEvaluator, state: SparseState) -> tuple[tuple[Estimate, ...], SparseState]:
        if self._scored and evaluator.key.step % self.interval == 0:
            state = replace(state, bits=self._bits(evaluator, state.shares))
        estimates, inner = run_estimator(self.inner, evaluator.with_transform(self._masking(state)), state.inner)
        return estimates, replace(state, inner=inner)

    def _bits(self, evaluator: LossEvaluator, shares: Sequence[float]) -> dict[int, Tensor]:
        evaluator.theta.restore()
        blocks, norms = evaluator.theta.blocks, InputNorms(evaluator.theta.blocks)
        if self.kind == "wanda":
            with norms:
                evaluator.center()
        found: dict[int, Tensor] = {}
        for i, block in enumerate(blocks):
            weights, inputs = block.tensor.detach(), norms.of(i)
            scores = weights.abs().to(accumulation_dtype(weights.dtype))
            scores = scores if inputs is None else scores.mul_(inputs)
            moving = block.numel - math.floor(shares[i] * block.numel)
            found[i] = packed(largest(scores.neg_() if self.keep == "smallest" else scores, moving))
        return found

    def update_(
        self, theta: PerturbedParameters, state: SparseState, estimates: Sequence[Estimate], context: StepContext
    ) -> SparseState:
        if not self.sparsity:
            return replace(state, inner=self.inner.update_(theta, state.inner, estimates, context))
        mask = self._mask(state, self._since(context.key))

        def masked(index: int, delta: Tensor) -> Tensor:
            own = delta.clone(memory_format=torch.contiguous_format)  # it may be the method's memory itself
            return mask.clear_(own, theta.blocks[index], index)

        with theta.transform_dense_updates(masked):
            return replace(state, inner=self.inner.update_(theta, state.inner, estimates, context))


def global_shares(blocks: Blocks, sparsity: float) -> tuple[float, ...]:
    """Of each block, how many of its weights are among the smallest ``sparsity`` of all blocks together."""
    every = math.ceil(blocks.numel / SAMPLE)
    sample = torch.cat([block.flat[::every].to(accumulation_dtype(block.tensor.dtype)).abs().cpu() for block in blocks])
    limit = sample.kthvalue(math.ceil(sparsity * len(sample))).values.item()
    return tuple((block.flat.abs() <= limit).sum().item() / max(1, block.numel) for block in blocks)
