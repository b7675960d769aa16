"""MeZO-SVRG: now and then a better estimate at an anchor; in between, small batches corrected by theirs at the anchor.

Gautam et al. 2024, arXiv:2404.08080 (MeZO-SVRG). Every q steps the anchor becomes theta, and the step is along the
full batch's estimate g. In between theta -= lr2 * (g_B(theta) z - g_B(anchor) z + g), both along one direction z: at
the anchor the correction vanishes. The released code is wrong there: its anchor is the live parameters, which move
along; its two estimates have noise of their own, so that their difference adds variance; and the current batch stands in for
the full one. Differs from the paper in that
- the full batch is ``anchor_batches`` batches, this step's and further ones;
- g is kept as keys and scalars: one copy of the weights is kept, not two;
- a wrapper (a tuner's sigma) scales g's directions as it does those of the present step.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext


@dataclass(frozen=True)
class SVRGState:
    """The weights at the anchor, and the full batch's projected gradients there."""

    anchor: tuple[torch.Tensor, ...]
    since: int = -1
    """The step of the anchor and of its directions' keys; -1 before the first."""
    gradients: tuple[float, ...] = ()
    """Along the direction of each draw."""
    along: tuple[Direction, ...] = ()
    """These directions, within a step."""
    walked: tuple[Direction, ...] = ()
    """The directions evaluated in this step, transformed."""


@final
@dataclass(frozen=True)
class SVRG(base.CustomEstimator[SVRGState]):
    """MeZO with variance reduction about an anchor."""

    info: ClassVar = base.MethodInfo("Gautam et al. 2024, arXiv:2404.08080, MeZO-SVRG", "1P, twice in a step")
    positive = ("ratio",)
    counts = ("interval", "anchor_batches")
    interval: int = 2
    """Steps from one anchor to the next, q."""
    anchor_batches: int = 4
    """Batches of the anchor's estimate."""
    ratio: float = 0.1
    """Learning rate of the corrected steps over that of the anchor's, eta_2 / eta_1."""

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions * (self.anchor_batches + 2 * (self.interval - 1)) / self.interval

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(block.tensor.nbytes for block in blocks)

    def scratch_bytes(self, blocks: Blocks) -> int:
        return self.state_bytes(blocks)  # theta, while the losses at the anchor are evaluated

    def init(self, blocks: Blocks) -> SVRGState:
        return SVRGState(tuple(block.tensor.detach().clone() for block in blocks))

    def estimate(self, evaluator: LossEvaluator, state: SVRGState) -> tuple[Estimates, SVRGState]:
        along: list[Direction] = []
        if not self._due(state, evaluator.key):
            at_anchor = replace(evaluator, key=Key(evaluator.key.seed, state.since))
            along = [evaluator.transform(direction) for direction in base.directions_of(self, at_anchor, state)]
        directions = base.directions_of(self, evaluator, state)
        estimates = tuple(evaluator.two_point(direction, self.epsilon) for direction in directions)
        walked = (*state.walked, *(estimate.direction for estimate in estimates))
        return estimates, replace(state, along=(*state.along, *along), walked=walked)

    def _due(self, state: SVRGState, key: Key) -> bool:
        return state.since < 0 or key.step % self.interval == 0

    def update_(self, theta: PerturbedParameters, state: SVRGState, estimates: Estimates, context: StepContext) -> SVRGState:
        if self._due(state, context.key):
            return self._anchor_step(theta, state, estimates, context)
        theta.restore()
        here, anchor = {i: theta.value(i).clone() for i in range(len(theta.blocks))}, dict(enumerate(state.anchor))
        theta.interpolate(anchor, here, dict.fromkeys(here, 0.0))
        at_anchor = [base.two_point_in_update(theta, context.closure, u, self.epsilon) for u in state.walked]
        theta.interpolate(anchor, here, dict.fromkeys(here, 1.0))
        slopes = [e.projected_gradient - a.projected_gradient for e, a in zip(estimates, at_anchor, strict=True)]
        lr = [self.ratio * rate for rate in context.lr]
        base.descend(theta, [replace(e, projected_gradient=g) for e, g in zip(estimates, slopes, strict=True)], lr)
        for direction, slope in zip(state.along, state.gradients, strict=True):
            theta.add(direction, [-rate * (slope / self.num_directions) for rate in lr])
        return replace(state, along=(), walked=())

    def _anchor_step(self, theta: PerturbedParameters, state: SVRGState, found: Estimates, context: StepContext) -> SVRGState:
        """Make theta the anchor, and step along the full batch's estimate there."""
        further, full = [context.fresh(i) for i in range(self.anchor_batches - 1)], []
        for estimate, direction in zip(found, state.walked, strict=True):
            others = [base.two_point_in_update(theta, closure, direction, self.epsilon) for closure in further]
            total = estimate.projected_gradient + sum(other.projected_gradient for other in others)
            full.append(replace(estimate, projected_gradient=total / self.anchor_batches))
        theta.restore()
        base.descend(theta, full, context.lr)  # noted now, made at the end of the step
        theta.final()
        with torch.no_grad():
            for anchor, block in zip(state.anchor, theta.blocks, strict=True):
                anchor.copy_(block.tensor)
        return SVRGState(state.anchor, context.key.step, tuple(estimate.projected_gradient for estimate in full))
