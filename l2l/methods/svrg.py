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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Closure, finite_loss
from l2l.methods import base
from l2l.noise import Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.params.engine import defer_interrupt


@dataclass(frozen=True)
class SVRGState:
    """The weights at the anchor, and the full batch's projected gradients there."""

    anchor: tuple[Tensor, ...]
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

    def estimate(self, evaluator: base.LossEvaluator, state: SVRGState) -> tuple[base.Estimates, SVRGState]:
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

    def update_(
        self, theta: PerturbedParameters, state: SVRGState, estimates: base.Estimates, context: base.StepContext
    ) -> SVRGState:
        if self._due(state, context.key):
            return self._move_anchor(theta, state, estimates, context)
        slopes = self._slopes_at_anchor(theta, state, context)
        lr = [self.ratio * rate for rate in context.lr]
        for estimate, slope in zip(estimates, slopes, strict=True):
            _step(theta, estimate.direction, (estimate.projected_gradient - slope) / len(estimates), lr)
        for direction, slope in zip(state.along, state.gradients, strict=True):
            _step(theta, direction, slope / self.num_directions, lr)
        return replace(state, along=(), walked=())

    def _move_anchor(
        self, theta: PerturbedParameters, state: SVRGState, estimates: base.Estimates, context: base.StepContext
    ) -> SVRGState:
        """Make theta the anchor, and step along the full batch's estimate there."""
        further = [context.fresh(i) for i in range(self.anchor_batches - 1)]
        gradients = []
        for estimate, direction in zip(estimates, state.walked, strict=True):
            slopes = [self._slope(theta, direction, closure) for closure in further]
            gradients.append((estimate.projected_gradient + sum(slopes)) / self.anchor_batches)
        theta.restore()
        with torch.no_grad(), defer_interrupt():
            for anchor, block in zip(state.anchor, theta.blocks, strict=True):
                anchor.copy_(block.tensor)
        for estimate, slope in zip(estimates, gradients, strict=True):
            _step(theta, estimate.direction, slope / len(estimates), context.lr)
        return SVRGState(state.anchor, context.key.step, tuple(gradients))

    def _slopes_at_anchor(self, theta: PerturbedParameters, state: SVRGState, context: base.StepContext) -> list[float]:
        """This batch's projected gradients at the anchor, along the directions that were evaluated at theta."""
        theta.restore()
        here = {i: theta.value(i).clone() for i in range(len(theta.blocks))}
        anchor = dict(enumerate(state.anchor))
        theta.interpolate(anchor, here, dict.fromkeys(here, 0.0))
        slopes = [self._slope(theta, direction, context.closure) for direction in state.walked]
        theta.interpolate(anchor, here, dict.fromkeys(here, 1.0))
        return slopes

    def _slope(self, theta: PerturbedParameters, direction: Direction, closure: Closure) -> float:
        theta.perturb(direction, self.epsilon)
        plus = finite_loss(closure)
        theta.perturb(direction, -self.epsilon)
        return (plus - finite_loss(closure)) / (2 * self.epsilon)


def _step(theta: PerturbedParameters, direction: Direction, slope: float, lr: Sequence[float]) -> None:
    theta.add(direction, [-rate * slope for rate in lr])
