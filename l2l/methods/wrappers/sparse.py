"""A mask around any method: some coordinates are neither perturbed nor updated. ``sparse+mezo``, ``sparse+learned+lozo``.

Zhang et al. 2024 (ZO-Bench), arXiv:2402.11592, gradient sparsity. The mask multiplies the method's directions. Differs
from the released code in that
- a random mask has the requested fraction of zeros: the code compares normal noise with s, which zeroes Phi(s)
  (69 % where half is asked for),
- ``magnitude`` and ``wanda`` (the weight times the norm of its inputs, Sun et al. 2023, arXiv:2306.11695) choose
  coordinates; the code uses magnitudes for the fractions of random masks alone (here ``scope="global"``) and never scores by
  inputs.
Directions are not scaled up for the frozen coordinates, there nor here. Momentum and running means of a method move no frozen
coordinate either."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch

from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.params.inputs import InputNorms
from l2l.params.operators import Drawn, Mask, Masked, Stored, largest, packed, packed_bytes

SAMPLE = 10**7
"""Most weights that a quantile over all blocks is taken of; of larger models, every n-th."""


@dataclass(frozen=True)
class SparseState:
    """The method's state, and the frozen coordinates."""

    inner: Any
    shares: tuple[float, ...]
    """Fraction of each block's coordinates that is frozen."""
    bits: dict[int, torch.Tensor]
    """Which ones move, where they are chosen by score: one bit each, by index of the block."""


@final
@dataclass(frozen=True)
class Sparse(base.Wrapper[SparseState]):
    """Some coordinates stay frozen, under another method."""

    info: ClassVar = base.MethodInfo("Zhang et al. 2024, arXiv:2402.11592", "0P; by magnitude or wanda, 1 bit per weight")
    counts = ("interval",)
    fractions = ("sparsity",)
    kind: Literal["random", "magnitude", "wanda"] = "random"
    """Which are frozen: drawn by the key; by |theta|; or by |theta| times the norm of its inputs, for one more pass per
    mask."""
    sparsity: float = 0.5
    """Fraction of the coordinates that is frozen; 0 freezes none."""
    interval: int = 1
    """Steps that share a mask."""
    scope: Literal["block", "global"] = "block"
    """Whether every block has this fraction, or the smallest weights of all blocks together decide the fraction of each."""
    keep: Literal["largest", "smallest"] = "largest"
    """Which scores go on moving, of magnitude and wanda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice("kind", self.kind, ("random", "magnitude", "wanda"))
        base.check_choice("scope", self.scope, ("block", "global"))
        base.check_choice("keep", self.keep, ("largest", "smallest"))
        if self.kind == "wanda" and self.sparsity:
            object.__setattr__(self, "not_replayable", "its masks are made of the norms of activations")

    @property
    def passes(self) -> float:
        return self.inner.passes + (1 / self.interval if self.kind == "wanda" and self.sparsity else 0)

    @property
    def _scored(self) -> bool:
        return self.kind != "random" and self.sparsity > 0

    def state_bytes(self, blocks: Blocks) -> int:
        return self.inner.state_bytes(blocks) + (sum(packed_bytes(b.numel) for b in blocks) if self._scored else 0)

    def scratch_bytes(self, blocks: Blocks) -> int:
        # the bits of the mask before, which the last step's directions hold
        return self.inner.scratch_bytes(blocks) + self.state_bytes(blocks) - self.inner.state_bytes(blocks)

    def init(self, blocks: Blocks) -> SparseState:
        shares = (self.sparsity,) * len(blocks)
        if self.scope == "global" and self.sparsity:
            inverted = self._scored and self.keep == "smallest"
            small = global_shares(blocks, 1 - self.sparsity if inverted else self.sparsity)
            shares = tuple(1 - share for share in small) if inverted else small
        return SparseState(self.inner.init(blocks), shares, {})

    def direction(self, blocks: Blocks, state: SparseState, key: Key) -> Direction:
        return self._masking(state)(self.inner.direction(blocks, state.inner, key))

    def _masking(self, state: SparseState) -> Callable[[Direction], Direction]:
        """Masks directions. Directions that share a shape share the masked shape too."""
        known: dict[tuple[base.DirectionOperator | None, Key], Masked] = {}

        def mask(direction: Direction) -> Direction:
            since, shape = base.key_since(direction.key, self.interval), direction.shape
            return replace(direction, shape=known.setdefault((shape, since), Masked(self._mask(state, since), shape)))

        return mask if self.sparsity else lambda direction: direction

    def _mask(self, state: SparseState, since: Key) -> Mask:
        return Stored(state.bits) if self._scored else Drawn(since, state.shares)

    def estimate(self, evaluator: LossEvaluator, state: SparseState) -> tuple[Estimates, SparseState]:
        if self._scored and evaluator.key.step % self.interval == 0:
            state = replace(state, bits=self._bits(evaluator, state.shares))
        estimates, inner = base.run_estimator(self.inner, evaluator.with_transform(self._masking(state)), state.inner)
        return estimates, replace(state, inner=inner)

    def _bits(self, evaluator: LossEvaluator, shares: Sequence[float]) -> dict[int, torch.Tensor]:
        evaluator.theta.restore()
        blocks, norms = evaluator.theta.blocks, InputNorms(evaluator.theta.blocks)
        if self.kind == "wanda":
            with norms:
                evaluator.center()
        found: dict[int, torch.Tensor] = {}
        for i, block in enumerate(blocks):
            weights, inputs = block.tensor.detach(), norms.of(i)
            scores = weights.abs().to(base.accumulation_dtype(weights.dtype))
            scores = scores if inputs is None else scores.mul_(inputs)
            moving = block.numel - math.floor(shares[i] * block.numel)
            found[i] = packed(largest(scores.neg_() if self.keep == "smallest" else scores, moving))
        return found

    def update_(
        self, theta: PerturbedParameters, state: SparseState, estimates: Estimates, context: StepContext
    ) -> SparseState:
        if not self.sparsity:
            return replace(state, inner=self.inner.update_(theta, state.inner, estimates, context))
        mask = self._mask(state, base.key_since(context.key, self.interval))

        def masked(index: int, delta: torch.Tensor) -> torch.Tensor:
            own = delta.clone(memory_format=torch.contiguous_format)  # it may be a tensor of the method's state
            return mask.clear_(own, theta.blocks[index], index)

        with theta.transform_dense_updates(masked):
            return replace(state, inner=self.inner.update_(theta, state.inner, estimates, context))


def global_shares(blocks: Blocks, sparsity: float) -> tuple[float, ...]:
    """Of each block, the fraction of its weights among the smallest ``sparsity`` of all blocks together."""
    stride = math.ceil(blocks.numel / SAMPLE)
    sample = torch.cat([block.flat[::stride].to(base.accumulation_dtype(block.tensor.dtype)).abs().cpu() for block in blocks])
    limit = sample.kthvalue(math.ceil(sparsity * len(sample))).values.item()
    return tuple((block.flat.abs() <= limit).sum().item() / max(1, block.numel) for block in blocks)
