"""Blocks in groups around any method: each group is looked at by itself, the others at home. ``blockwise+mezo``.

Zhang et al. 2024 (ZO-Bench), arXiv:2402.11592, block-wise estimates. The step is the sum of what the groups give, so that the
mean of the estimate is the gradient and its variance in a group that of the group alone, for as many times the passes. Differs
from the released code in
- groups by structure, in any architecture, or by patterns: the code has lists of the layers of one,
- noise of its own for each group: the code sows the same seed for all, so that equal groups move in step,
- moving every block: the code leaves embeddings, last norm and head as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

from l2l.estimators.finite_difference import Estimate, finite_loss
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    Method,
    MethodInfo,
    StepContext,
    check_counts,
    run_estimator,
)
from l2l.noise import Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.params.operators import Group, group_blocks, layer_groups_of, layers, matched


@dataclass(frozen=True)
class BlockwiseState:
    """That of the method; and within a step what the groups whose turn is still to come will look along."""

    inner: Any
    directions: tuple[Direction, ...] = ()


@final
@dataclass(frozen=True)
class Blockwise(CustomEstimator[BlockwiseState]):
    """Estimates of one group of blocks at a time, under another method. Extra memory: none."""

    info: ClassVar = MethodInfo("Zhang et al. 2024, arXiv:2402.11592", "0P")
    inner: Method[Any]
    level: Literal["block", "layer", "all"] = "layer"
    """What is not divided: a tensor; a layer, by :func:`l2l.params.operators.layers`; nothing is, which is the method inside."""
    groups: int = 4
    """Neighbours are put together to so many groups; a model of fewer layers (or tensors) has as many groups as these."""
    patterns: Sequence[str] = ()
    """Instead of level and groups: a regular expression over block names for each group, the first that matches holds."""
    apply: Literal["after", "at once"] = "after"
    """Whether theta moves when all groups are seen, or after each: then the next sees it moved."""
    epsilon: float = field(init=False)
    num_directions: int = field(init=False)

    def __post_init__(self) -> None:
        check_counts(groups=self.groups)
        for name, known in (("level", ("block", "layer", "all")), ("apply", ("after", "at once"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is no regular expression: {error}") from error
        for name in ("epsilon", "num_directions", "step_is_normalized", "leaves_span", "differentiates"):
            object.__setattr__(self, name, getattr(self.inner, name))

    @property
    def passes(self) -> float:
        """What is looked at, as often as there may be groups; what the method inside spends on more, once."""
        times = len(self.patterns) or (1 if self.level == "all" else self.groups)
        return times * (self.inner.passes - self.passes_once) + self.passes_once

    @property
    def passes_once(self) -> float:
        return self.inner.passes_once

    def state_bytes(self, blocks: Blocks) -> int:
        return self.inner.state_bytes(blocks)

    def init(self, blocks: Blocks) -> BlockwiseState:
        self.parts(blocks)
        state = self.inner.init(blocks)
        if self.apply == "at once" and (isinstance(self.inner, CustomEstimator) or state is not None):
            raise ValueError(
                "apply='at once' takes a step of the method inside for every group, which one that remembers steps or looks "
                "in its own way would mistake for steps: use apply='after', or put it outside (learned+blockwise+mezo)"
            )
        return BlockwiseState(state)

    def parts(self, blocks: Blocks) -> list[Group]:
        """The groups. Raises ValueError where patterns leave a block out, or a group empty."""
        if self.patterns:
            return matched(blocks, self.patterns)
        units = [[i] for i in range(len(blocks))]
        if self.level == "layer":
            inside, outside = layers(blocks)
            units = [*inside, outside] if outside else inside
        return group_blocks(units, 1 if self.level == "all" else self.groups)

    def direction(self, blocks: Blocks, state: BlockwiseState, key: Key) -> Direction:
        return layer_groups_of(self.inner.direction(blocks, state.inner, key), self.parts(blocks)[0])

    def estimate(self, evaluator: LossEvaluator, state: BlockwiseState) -> tuple[tuple[Estimate, ...], BlockwiseState]:
        blocks, inner, seen = evaluator.theta.blocks, state.inner, []
        parts = self.parts(blocks)
        if isinstance(self.inner, CustomEstimator):
            for part in parts:
                estimates, inner = run_estimator(self.inner, _of(evaluator, part), inner)
                seen += estimates
            return tuple(seen), BlockwiseState(inner)
        keys = [evaluator.key.with_draw(draw) for draw in range(self.num_directions)]
        along = [evaluator.transform(self.inner.direction(blocks, inner, key)) for key in keys]  # all of them at home
        waiting = tuple(along) if self.apply == "at once" else ()
        for part in parts[: 1 if waiting else None]:
            seen += [
                replace(evaluator, transform=lambda u: u).two_point(layer_groups_of(u, part), self.epsilon)
                for u in along
            ]
        return tuple(seen), BlockwiseState(inner, waiting)

    def update_(
        self, theta: PerturbedParameters, state: BlockwiseState, estimates: Sequence[Estimate], context: StepContext
    ) -> BlockwiseState:
        parts = self.parts(theta.blocks)
        if not state.directions:
            # The method inside takes the mean over estimates: over groups that must be the sum.
            summed = [_times(estimate, len(parts)) for estimate in estimates]
            return BlockwiseState(self.inner.update_(theta, state.inner, summed, context))
        inner = self.inner.update_(theta, state.inner, estimates, context)
        for part in parts[1:]:
            seen = [self._seen(theta, layer_groups_of(u, part), context) for u in state.directions]
            inner = self.inner.update_(theta, inner, seen, context)
        return BlockwiseState(inner)

    def _seen(self, theta: PerturbedParameters, direction: Direction, context: StepContext) -> Estimate:
        theta.perturb(direction, self.epsilon)
        plus = finite_loss(context.closure)  # the closure evaluates where theta stands
        theta.perturb(direction, -self.epsilon)
        minus = finite_loss(context.closure)
        return Estimate(direction, plus, minus, (plus - minus) / (2 * self.epsilon))


def _times(estimate: Estimate, count: int) -> Estimate:
    direction = estimate.direction
    return estimate if count == 1 else replace(estimate, direction=replace(direction, factor=count * direction.factor))


def _of(evaluator: LossEvaluator, part: Group) -> LossEvaluator:
    """The sight of a group. What is wrapped around acts first: it sees all blocks."""
    return replace(evaluator, transform=lambda direction: layer_groups_of(evaluator.transform(direction), part))
