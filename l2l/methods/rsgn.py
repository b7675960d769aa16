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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from l2l.estimators import DirectionalStatistics, balanced, directional_statistics, subspace_newton
from l2l.methods import base
from l2l.methods.base import Blocks, Distribution, Estimate, Estimates, LossEvaluator, PerturbedParameters, StepContext
from l2l.params import Direction


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
    top_directions: int = 0
    """Further directions, of the ``top_blocks`` alone. Where passes begin at the lowest layer in which anything moves, as in
    `l2l fine-tune`, those of a model's last layer cost a few hundredths of a pass each. They are rescaled to the mean curvature
    of the others (:func:`l2l.estimators.balanced`)."""
    top_blocks: tuple[str, ...] = ()
    """Names of blocks. `l2l fine-tune` sets those of the last layer and of what follows it."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "top_blocks", tuple(self.top_blocks))
        if not isinstance(self.top_directions, int) or isinstance(self.top_directions, bool) or self.top_directions < 0:
            raise ValueError(f"top_directions={self.top_directions!r} must be a whole number, at least 0")

    @property
    def passes(self) -> float:
        return self.num_directions + self.top_directions + 1.0

    @property
    def whole_passes(self) -> float:
        return self.num_directions + 1.0

    @property
    def from_center(self) -> bool:
        return True

    def init(self, blocks: Blocks) -> RSGNState:
        """Raises ValueError where there are directions of the ``top_blocks``, and no such blocks."""
        if self.top_directions and not {block.name for block in blocks}.intersection(self.top_blocks):
            raise ValueError(
                f"top_directions={self.top_directions} are directions of top_blocks, which name no block that is trained "
                f"({', '.join(self.top_blocks[:3]) or 'none is given'}): set top_blocks, or leave top_directions at 0"
            )
        return RSGNState()

    def estimate(self, evaluator: LossEvaluator, state: RSGNState) -> tuple[Estimates, RSGNState]:
        count = self.num_directions + self.top_directions
        blocks, unit = evaluator.theta.blocks, base.directions_of(self, evaluator, state, count)
        directions = [self._placed(evaluator.transform(direction), blocks) for direction in unit]
        whole = sum(direction.key.draw < self.num_directions for direction in directions)
        bare = replace(evaluator, transform=lambda direction: direction)
        at = bare.center_outputs()
        plus = [bare.outputs_along(direction, self.epsilon) for direction in directions]

        def solve() -> list[float]:
            seen = directional_statistics(at, plus, None, self.epsilon)
            slopes = seen.mean.tolist()
            seen, factors = balanced(seen, whole) if 0 < whole < len(plus) else (seen, 1.0)
            now = self._observed(state, seen)
            signal = max(now.signal / now.weight, self.signal_floor) * seen.curvature_along if now.weight else None
            unit = 1.0 if at.logits is not None else at.loss**2
            lengths = factors * subspace_newton(seen, signal, self.damping, self.gain, self.trust * unit)
            return [now.signal, now.weight, *slopes, *lengths.tolist()]

        signal, weight, *rest = evaluator.reading(solve)
        slopes, lengths = rest[: len(directions)], rest[len(directions) :]
        found = zip(directions, plus, slopes, strict=True)
        estimates = tuple(Estimate(u, there.loss, None, slope, at.loss) for u, there, slope in found)
        return estimates, RSGNState(signal, weight, tuple(lengths))

    def _placed(self, direction: Direction, blocks: Blocks) -> Direction:
        """The direction itself, or one of the draws after the first N restricted to the ``top_blocks``."""
        if direction.key.draw < self.num_directions:
            return direction
        inside = [block.name in self.top_blocks for block in blocks]

        def kept(scales: Sequence[float]) -> tuple[float, ...]:
            return tuple(scale if own else 0.0 for scale, own in zip(scales, inside, strict=True)) if scales else ()

        return replace(direction, sigma=kept(direction.sigma), basis_sigma=kept(direction.basis_sigma))

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
