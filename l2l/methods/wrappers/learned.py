"""A tuner's sigma under any method: ``learned+lozo``, ``learned+adam``.

The method chooses its directions and what becomes of the estimates; the tuner sets the scale of every block:
u_b = factor * sigma_b * (the method's own u_b), in perturbation and update alike. ``learned+mezo`` is ``learned``, bit for bit
where lr is a number (under ``auto`` the loss at theta is evaluated at another moment)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext
from l2l.methods.learned import Learned
from l2l.tuners import RunStatistics, Tuner


@dataclass(frozen=True)
class LearnedWrapperState:
    """The method's state, and the statistics that the tuner's features are computed from."""

    inner: Any
    history: RunStatistics


@final
@dataclass(frozen=True)
class LearnedWrapper(base.Wrapper[LearnedWrapperState]):
    """Sigma from a tuner under another method."""

    info: ClassVar = base.MethodInfo(
        "ZO Fine-tuner, arXiv:2510.00419, under any direction and update", "the tuner, and some 50 bytes per block"
    )
    tuner: Tuner
    horizon: int | None = None
    """Steps of the run, for tuners with the fraction of the run as a feature; None: unknown."""

    @property
    def _own(self) -> Learned:
        return Learned(self.tuner, self.horizon)

    def state_bytes(self, blocks: Blocks) -> int:
        return self.inner.state_bytes(blocks) + self._own.state_bytes(blocks)

    def init(self, blocks: Blocks) -> LearnedWrapperState:
        return LearnedWrapperState(self.inner.init(blocks), self._own.init(blocks))

    def direction(self, blocks: Blocks, state: LearnedWrapperState, key: Key) -> Direction:
        return self._scaled(blocks, state, self.inner.direction(blocks, state.inner, key))

    def _scaled(self, blocks: Blocks, state: LearnedWrapperState, direction: Direction) -> Direction:
        """The direction with the tuner's sigma; ValueError where the tuner has a basis, and the method its own directions."""
        own = self._own.direction(blocks, state.history, direction.key)
        return replace(
            direction,
            sigma=tuple(a * b for a, b in zip(direction.sigma, own.sigma, strict=True)),
            factor=direction.factor * own.factor,
            centre=own.centre,
            basis=own.basis,
            basis_sigma=own.basis_sigma,
        )

    def estimate(self, evaluator: LossEvaluator, state: LearnedWrapperState) -> tuple[Estimates, LearnedWrapperState]:
        blocks = evaluator.theta.blocks
        scaled = evaluator.with_transform(lambda direction: self._scaled(blocks, state, direction))
        estimates, inner = base.run_estimator(self.inner, scaled, state.inner)
        return estimates, replace(state, inner=inner)

    def update_(
        self, theta: PerturbedParameters, state: LearnedWrapperState, estimates: Estimates, context: StepContext
    ) -> LearnedWrapperState:
        own = self._own
        sigma = own.direction(theta.blocks, state.history, estimates[-1].direction.key).sigma
        inner = self.inner.update_(theta, state.inner, estimates, context)
        return LearnedWrapperState(inner, own.statistics_after(theta, state.history, estimates, context, sigma))
