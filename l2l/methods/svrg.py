"""MeZO-SVRG: now and then a better estimate at an anchor; in between, small batches corrected by what they say there.

Gautam et al. 2024, arXiv:2404.08080 (MeZO-SVRG). Every q steps the anchor becomes theta, and the step is along the
full batch's estimate g. In between theta -= lr2 * (g_B(theta) z - g_B(anchor) z + g), both along one direction z: at
the anchor the correction vanishes. The released code is wrong there: its anchor is the live parameters, which move
along; its two estimates have noise of their own, so that their difference adds variance; and the batch at hand stands
for the full one. Differs from the paper in that
- the full batch is ``anchor_batches`` batches, this step's and further ones;
- g is kept as keys and scalars: one copy of the weights is kept, not two;
- what is put around the method (a tuner's sigma) scales g's directions as it does those of the present step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Closure, Estimate, finite_loss
from l2l.methods.base import CustomEstimator, LossEvaluator, MethodInfo, StepContext, check_counts, check_positive
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.params.engine import defer_interrupt


@dataclass(frozen=True)
class SVRGState:
    """The weights at the anchor, and the full batch's projected gradients there."""

    anchor: tuple[Tensor, ...]
    since: int = -1
    """The step that the anchor is of, and its directions' keys; -1 before the first."""
    gradients: tuple[float, ...] = ()
    """Along each draw's direction."""
    along: tuple[Direction, ...] = ()
    """These directions, while a step is under way."""
    walked: tuple[Direction, ...] = ()
    """What this step has looked along, each as it was walked."""


@final
@dataclass(frozen=True)
class SVRG(CustomEstimator[SVRGState]):
    """MeZO with variance reduction about an anchor. Extra memory: a copy of the weights, another one during a step."""

    info: ClassVar = MethodInfo("Gautam et al. 2024, arXiv:2404.08080, MeZO-SVRG", "1P")
    epsilon: float = 1e-3
    num_directions: int = 1
    distribution: Distribution = "gaussian"
    interval: int = 2
    """Steps from one anchor to the next, q."""
    anchor_batches: int = 4
    """Batches that stand for the full one."""
    ratio: float = 0.1
    """Learning rate of the corrected steps over that of the anchor's, eta_2 / eta_1."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon, ratio=self.ratio)
        check_counts(num_directions=self.num_directions, interval=self.interval, anchor_batches=self.anchor_batches)

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions * (self.anchor_batches + 2 * (self.interval - 1)) / self.interval

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(block.numel * block.tensor.element_size() for block in blocks)

    def init(self, blocks: Blocks) -> SVRGState:
        return SVRGState(tuple(block.tensor.detach().clone() for block in blocks))

    def direction(self, blocks: Blocks, state: SVRGState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def estimate(self, evaluator: LossEvaluator, state: SVRGState) -> tuple[tuple[Estimate, ...], SVRGState]:
        def directions(key: Key) -> list[Direction]:
            return [
                self.direction(evaluator.theta.blocks, state, key.with_draw(draw))
                for draw in range(self.num_directions)
            ]

        along: tuple[Direction, ...] = ()
        if not self._due(state, evaluator.key):
            along = tuple(
                evaluator.transform(direction) for direction in directions(Key(evaluator.key.seed, state.since))
            )
        seen = tuple(evaluator.two_point(direction, self.epsilon) for direction in directions(evaluator.key))
        walked = (*state.walked, *(estimate.direction for estimate in seen))
        return seen, replace(state, along=(*state.along, *along), walked=walked)

    def _due(self, state: SVRGState, key: Key) -> bool:
        return state.since < 0 or key.step % self.interval == 0

    def update_(
        self, theta: PerturbedParameters, state: SVRGState, estimates: Sequence[Estimate], context: StepContext
    ) -> SVRGState:
        if self._due(state, context.key):
            return self._anchored(theta, state, estimates, context)
        there = self._at_anchor(theta, state, context)
        lr = [self.ratio * rate for rate in context.lr]
        for seen, own in zip(estimates, there, strict=True):
            _step(theta, seen.direction, (seen.projected_gradient - own) / len(estimates), lr)
        for direction, slope in zip(state.along, state.gradients, strict=True):
            _step(theta, direction, slope / self.num_directions, lr)
        return replace(state, along=(), walked=())

    def _anchored(
        self, theta: PerturbedParameters, state: SVRGState, estimates: Sequence[Estimate], context: StepContext
    ) -> SVRGState:
        """A step along the full batch's estimate, from what is the anchor now."""
        further = [context.fresh(i) for i in range(self.anchor_batches - 1)]
        gradients = []
        for seen, walked in zip(estimates, state.walked, strict=True):
            slopes = [self._slope(theta, walked, closure) for closure in further]
            gradients.append((seen.projected_gradient + sum(slopes)) / self.anchor_batches)
        theta.restore()
        with torch.no_grad(), defer_interrupt():
            for kept, block in zip(state.anchor, theta.blocks, strict=True):
                kept.copy_(block.tensor)
        for seen, slope in zip(estimates, gradients, strict=True):
            _step(theta, seen.direction, slope / len(estimates), context.lr)
        return SVRGState(state.anchor, context.key.step, tuple(gradients))

    def _at_anchor(self, theta: PerturbedParameters, state: SVRGState, context: StepContext) -> list[float]:
        """This batch's projected gradients at the anchor, along the directions that theta was looked from."""
        theta.restore()
        here = {i: theta.value(i).clone() for i in range(len(theta.blocks))}
        anchor = dict(enumerate(state.anchor))
        theta.interpolate(anchor, here, dict.fromkeys(here, 0.0))
        slopes = [self._slope(theta, walked, context.closure) for walked in state.walked]
        theta.interpolate(anchor, here, dict.fromkeys(here, 1.0))
        return slopes

    def _slope(self, theta: PerturbedParameters, direction: Direction, closure: Closure) -> float:
        theta.perturb(direction, self.epsilon)
        plus = finite_loss(closure)
        theta.perturb(direction, -self.epsilon)
        return (plus - finite_loss(closure)) / (2 * self.epsilon)


def _step(theta: PerturbedParameters, direction: Direction, slope: float, lr: Sequence[float]) -> None:
    theta.add(direction, [-rate * slope for rate in lr])
