"""Blocks in groups around any method: each group is evaluated by itself, the others unperturbed. ``blockwise+mezo``.

Zhang et al. 2024 (ZO-Bench), arXiv:2402.11592, block-wise estimates. The step is the sum of the groups' estimates, so that
its mean is the gradient and its variance in a group that of the group alone, for as many times the passes. Differs
from the released code in
- groups by structure, in any architecture, or by patterns: the code has lists of the layers of one,
- noise of its own for each group: the code uses one seed for all, so that equal groups move in step,
- moving every block: the code leaves embeddings, last norm and head as they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.params.operators import Group, group_blocks, layer_groups_of, layers, matched


@dataclass(frozen=True)
class BlockwiseState:
    """The method's state; and within a step, the directions of the groups that are still to be evaluated."""

    inner: Any
    directions: tuple[Direction, ...] = ()


@final
@dataclass(frozen=True)
class Blockwise(base.Wrapper[BlockwiseState]):
    """Estimates of one group of blocks at a time, under another method."""

    info: ClassVar = base.MethodInfo("Zhang et al. 2024, arXiv:2402.11592")
    counts = ("groups",)
    level: Literal["block", "layer", "all"] = "layer"
    """What is not divided: a tensor; a layer, by :func:`l2l.params.operators.layers`; all blocks, which is the method
    inside."""
    groups: int = 4
    """Number of groups, of neighbours; a model of fewer layers (or tensors) has as many groups as these."""
    patterns: Sequence[str] = ()
    """Instead of level and groups: a regular expression over block names for each group; the first that matches holds."""
    apply: Literal["after", "at once"] = "after"
    """Whether theta moves when all groups have been evaluated, or after each, before the next is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice("level", self.level, ("block", "layer", "all"))
        base.check_choice("apply", self.apply, ("after", "at once"))
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is no regular expression: {error}") from error

    @property
    def passes(self) -> float:
        """Those of the estimates, once per group; further ones of the method inside once."""
        times = len(self.patterns) or (1 if self.level == "all" else self.groups)
        return times * (self.inner.passes - self.passes_once) + self.passes_once

    def init(self, blocks: Blocks) -> BlockwiseState:
        self.parts(blocks)
        state = self.inner.init(blocks)
        if self.apply == "at once" and self.inner.estimator == "one_sided":
            raise ValueError("apply='at once' moves theta between groups: use two_sided estimates, which share no loss")
        stateful = isinstance(self.inner, base.CustomEstimator) or state is not None
        if self.apply == "at once" and (stateful or self.inner.leaves_span):
            raise ValueError(
                "apply='at once' takes a step of the method inside for every group, which one with a state or an estimator of "
                "its own would mistake for steps, and which one that leaves its directions could not take back: use "
                "apply='after', or put it outside (learned+blockwise+mezo)"
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

    def estimate(self, evaluator: LossEvaluator, state: BlockwiseState) -> tuple[Estimates, BlockwiseState]:
        blocks, inner, found = evaluator.theta.blocks, state.inner, []
        parts = self.parts(blocks)
        if isinstance(self.inner, base.CustomEstimator):
            for part in parts:
                # Outer wrappers act first: they see all blocks.
                own = replace(evaluator, transform=lambda u, part=part: layer_groups_of(evaluator.transform(u), part))
                estimates, inner = base.run_estimator(self.inner, own, inner)
                found += estimates
            return tuple(found), BlockwiseState(inner)
        along = [evaluator.transform(direction) for direction in base.directions_of(self.inner, evaluator, inner)]
        waiting = tuple(along) if self.apply == "at once" else ()
        bare = replace(evaluator, transform=lambda direction: direction)
        loss_center = bare.center() if self.inner.estimator == "one_sided" else None
        for part in parts[: 1 if waiting else None]:
            found += bare.estimates(self.inner, [layer_groups_of(u, part) for u in along], loss_center)
        return tuple(found), BlockwiseState(inner, waiting)

    def update_(
        self, theta: PerturbedParameters, state: BlockwiseState, estimates: Estimates, context: StepContext
    ) -> BlockwiseState:
        parts = self.parts(theta.blocks)
        if not state.directions:
            # The method inside takes the mean over estimates: over groups that must be the sum.
            if len(parts) > 1:
                longer = [replace(e.direction, factor=len(parts) * e.direction.factor) for e in estimates]
                estimates = tuple(replace(e, direction=u) for e, u in zip(estimates, longer, strict=True))
            return BlockwiseState(self.inner.update_(theta, state.inner, estimates, context))
        inner = self.inner.update_(theta, state.inner, estimates, context)
        for part in parts[1:]:
            along = [layer_groups_of(u, part) for u in state.directions]
            found = tuple(base.two_point_in_update(theta, context.closure, u, self.epsilon) for u in along)
            inner = self.inner.update_(theta, inner, found, context)
        return BlockwiseState(inner)
