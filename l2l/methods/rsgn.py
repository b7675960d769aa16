"""Random-subspace Gauss-Newton: a damped Newton step within the span of N directions, from the logits of N + 1 passes.

Along each direction u_k logits change by J_k [b, K] over epsilon, which tells more than the loss: c_k, the projected gradient;
M_kl, the Gauss-Newton matrix between the directions (:func:`l2l.estimators.directional_statistics`); and G, the squared length
of the gradient free of the batch's noise. The step -sum_k a_k u_k solves (M + M^2 / (b G) + damping tr(M) / N I) a = gain c,
cut to a trust region (:func:`l2l.estimators.subspace_newton`). A few stiff directions of the loss bound the learning rate of
methods that take the same step along all: here they are the large eigenvalues of M, and get short steps of their own, at the
price of a few of the N dimensions. So N must exceed their number, and b (K - 1), which bounds the rank of M, must exceed N.

Of this project; subspace Gauss-Newton in derivative-free least squares: Cartis, Fowkes, Shao 2022, arXiv:2211.09873. A closure
that returns losses per example gives the empirical Fisher matrix for M; one that returns a scalar gives the squared
derivatives alone, of rank one, without noise: it works, at short steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

from l2l.estimators import DirectionalStatistics, directional_statistics, subspace_newton
from l2l.methods import base
from l2l.methods.base import Blocks, Distribution, Estimate, Estimates, LossEvaluator, PerturbedParameters, StepContext


@dataclass(frozen=True)
class RSGNState:
    """The running mean of the signal, and the step that a step is about to take."""

    signal: float = 0.0
    """Weighted sum of the ratio of G to the mean curvature."""
    weight: float = 0.0
    """Sum of the weights."""
    lengths: tuple[float, ...] = ()
    """a_k of the directions, within a step."""


@final
@dataclass(frozen=True)
class RSGN(base.CustomEstimator[RSGNState]):
    """A Gauss-Newton step within N random directions, from logits."""

    info: ClassVar = base.MethodInfo("this project; Cartis, Fowkes, Shao 2022, arXiv:2211.09873")
    fixed_points: ClassVar = True
    step_is_normalized: ClassVar = True
    reads_outputs: ClassVar = True
    default_lr: ClassVar = 1.0
    positive = ("damping", "gain", "trust", "signal_floor")
    fractions = ("signal_decay",)
    num_directions: int = 16
    """N. Of the order of the rows of a batch, at most b (K - 1)."""
    distribution: Distribution = "packed_rademacher"
    gain: float = 0.3
    """Fraction of the step to the minimum within the subspace, where neither damping nor noise shorten it."""
    damping: float = 0.5
    """Added to M, in units of its mean diagonal."""
    trust: float = 0.02
    """Most change a^T M a / 2 of the loss, in nats, that the model of a step may predict for its second-order term. Where the
    closure returns losses of another unit, relative to the squared loss."""
    signal_decay: float = 0.9
    """Of the running mean of G / tr(M)."""
    signal_floor: float = 0.002
    """Least G in units of the mean diagonal of M: estimates of G may be negative."""

    @property
    def passes(self) -> float:
        return self.num_directions + 1.0

    @property
    def from_center(self) -> bool:
        return True

    def init(self, blocks: Blocks) -> RSGNState:
        return RSGNState()

    def estimate(self, evaluator: LossEvaluator, state: RSGNState) -> tuple[Estimates, RSGNState]:
        directions = [evaluator.transform(direction) for direction in base.directions_of(self, evaluator, state)]
        bare = replace(evaluator, transform=lambda direction: direction)
        at = bare.center_outputs()
        plus = [bare.outputs_along(direction, self.epsilon) for direction in directions]

        def solve() -> list[float]:
            seen = directional_statistics(at, plus, None, self.epsilon)
            now = self._observed(state, seen)
            signal = max(now.signal / now.weight, self.signal_floor) * seen.curvature_along if now.weight else None
            unit = 1.0 if at.logits is not None else at.loss**2
            lengths = subspace_newton(seen, signal, self.damping, self.gain, self.trust * unit)
            return [now.signal, now.weight, *seen.mean.tolist(), *lengths.tolist()]

        signal, weight, *rest = evaluator.reading(solve)
        slopes, lengths = rest[: len(directions)], rest[len(directions) :]
        found = zip(directions, plus, slopes, strict=True)
        estimates = tuple(Estimate(u, there.loss, None, slope, at.loss) for u, there, slope in found)
        return estimates, RSGNState(signal, weight, tuple(lengths))

    def _observed(self, state: RSGNState, seen: DirectionalStatistics) -> RSGNState:
        """The state with one more measurement of the signal, where the batch tells it."""
        signal, scale = seen.signal, seen.curvature_along
        if signal is None or scale == 0:
            return state
        keep = self.signal_decay
        return RSGNState(keep * state.signal + (1 - keep) * signal / scale, keep * state.weight + 1 - keep)

    def update_(self, theta: PerturbedParameters, state: RSGNState, estimates: Estimates, context: StepContext) -> RSGNState:
        for estimate, length in zip(estimates, state.lengths, strict=True):
            theta.add(estimate.direction, [-length * rate for rate in context.lr])
        return replace(state, lengths=())
