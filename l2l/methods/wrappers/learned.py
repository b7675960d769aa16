"""A tuner's sigma under any method: ``learned+lozo``, ``learned+adam``.

The method chooses its directions and what becomes of the estimates; the tuner sets the scale of every block in what is
looked along: u_b = factor * sigma_b * (the method's own u_b), in perturbation and update alike. ``learned+mezo`` is
``learned``, bit for bit where lr is a number (under ``auto`` the third loss is read at another moment of the walk)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

from l2l.estimators.finite_difference import Estimate
from l2l.methods.base import CustomEstimator, LossEvaluator, Method, MethodInfo, StepContext, run_estimator
from l2l.methods.learned import HISTORY_BYTES, Learned
from l2l.noise import Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics


@dataclass(frozen=True)
class LearnedWrapperState:
    """That of the method, and what the tuner remembers."""

    inner: Any
    history: RunStatistics


@final
@dataclass(frozen=True)
class LearnedWrapper(CustomEstimator[LearnedWrapperState]):
    """Sigma from a tuner under another method. Extra memory: some sixty bytes per block."""

    info: ClassVar = MethodInfo(
        "ZO Fine-tuner, arXiv:2510.00419, under any direction and update", "some 60 bytes per block"
    )
    inner: Method[Any]
    tuner: Tuner
    horizon: int | None = None
    """Steps that the run is to take, for tuners that look at the share that lies behind; None: unknown."""
    epsilon: float = field(init=False)
    num_directions: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("epsilon", "num_directions", "step_is_normalized", "leaves_span", "differentiates"):
            object.__setattr__(self, name, getattr(self.inner, name))

    @property
    def passes(self) -> float:
        return self.inner.passes

    @property
    def passes_once(self) -> float:
        return self.inner.passes_once

    def state_bytes(self, blocks: Blocks) -> int:
        return self.inner.state_bytes(blocks) + HISTORY_BYTES * len(blocks)

    def init(self, blocks: Blocks) -> LearnedWrapperState:
        return LearnedWrapperState(self.inner.init(blocks), self._own.init(blocks))

    @property
    def _own(self) -> Learned:
        return Learned(self.tuner, horizon=self.horizon)

    def direction(self, blocks: Blocks, state: LearnedWrapperState, key: Key) -> Direction:
        return self._scaled(blocks, state, self.inner.direction(blocks, state.inner, key))

    def _scaled(self, blocks: Blocks, state: LearnedWrapperState, direction: Direction) -> Direction:
        """The direction with the tuner's sigma.

        Raises:
            ValueError: the tuner has a basis, and the method directions of its own.
        """
        own = self._own.direction(blocks, state.history, direction.key)
        return replace(
            direction,
            sigma=tuple(a * b for a, b in zip(direction.sigma, own.sigma, strict=True)),
            factor=direction.factor * own.factor,
            centre=own.centre,
            basis=own.basis,
            basis_sigma=own.basis_sigma,
        )

    def estimate(
        self, evaluator: LossEvaluator, state: LearnedWrapperState
    ) -> tuple[tuple[Estimate, ...], LearnedWrapperState]:
        blocks = evaluator.theta.blocks
        through = evaluator.with_transform(lambda direction: self._scaled(blocks, state, direction))
        estimates, inner = run_estimator(self.inner, through, state.inner)
        return estimates, replace(state, inner=inner)

    def update_(
        self,
        theta: PerturbedParameters,
        state: LearnedWrapperState,
        estimates: Sequence[Estimate],
        context: StepContext,
    ) -> LearnedWrapperState:
        last = estimates[-1].direction
        own = self._own.direction(theta.blocks, state.history, last.key)
        inner = self.inner.update_(theta, state.inner, estimates, context)
        history = state.history.after(
            own.sigma,
            theta.moments(last),
            losses=[(estimate.losses[0], estimate.losses[-1]) for estimate in estimates],
            gradients=[estimate.projected_gradient for estimate in estimates],
            curvature=context.curvature,
            horizon=self.horizon,
        )
        return LearnedWrapperState(inner, history)
