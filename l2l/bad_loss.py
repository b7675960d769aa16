"""What becomes of a step whose losses went wrong: one that is not finite, or one that explodes.

A loss *explodes* where it lies above the running median of the run's losses by more than :data:`EXPLODING` times the largest
loss that the run began with; see :func:`explodes`. Of a step that evaluates several losses the largest counts, so that a mean
over directions hides none. The policies:

- ``raise``: FloatingPointError; the parameters are back where the step began.
- ``skip``: the step's update is dropped; weights, the method's state and the curvature of ``lr="auto"`` stay what they were.
- ``clip``: projected gradients (of a first-order method, the norm of the gradient) are bounded by :func:`gradient_limit` at
  every step. A loss that is not finite has no projected gradient: such a step is skipped.
- ``rollback:N``: weights, method state and curvature become again, bit for bit, those of N steps before, of which copies are
  kept in the host's memory; those of the run's beginning, or of the last rollback, where that is fewer steps ago.

Under all but ``raise`` the next step has the next key and the next batch, and everything is counted (:class:`BadLosses`). After
:data:`IN_A_ROW` steps without an update the error is raised all the same: nothing is being trained any more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, TypeAlias, cast, final, get_args

from l2l.estimators import BadLoss, Estimate

Kind: TypeAlias = Literal["raise", "skip", "clip", "rollback"]

WINDOW = 64
"""Steps over which the running medians go. The last ones of which the update was made."""
WARM_UP = 16
"""First steps, after which there is a scale to compare with: before, only losses that are not finite are bad."""
EXPLODING = 3.0
"""Multiple of the largest loss of the warm-up. Cross entropy of a language model begins at 2 to 4 nats and ends, where a run
diverges, beyond the ln(vocabulary) = 10 to 12 of uniform logits; a mislabeled row among 16 costs less than one nat."""
CLIP = 10.0
"""Multiple of the median size of projected gradients. They are Gaussian given the gradient, so that 10 medians are 6.7 standard
deviations: chance does not reach that far."""
IN_A_ROW = 20
"""Steps without an update after which a run ends."""


@final
@dataclass(frozen=True)
class Policy:
    """``raise``, ``skip``, ``clip`` or ``rollback:N``."""

    kind: Kind = "raise"
    back: int = 0
    """Steps of a rollback."""

    @staticmethod
    def parse(text: str) -> "Policy":
        """The policy of that name; ValueError where there is none."""
        kind, colon, steps = text.partition(":")
        if kind not in get_args(Kind) or (kind == "rollback") != bool(colon):
            raise ValueError(f"on_bad_loss={text!r} must be raise, skip, clip or rollback:N, as in rollback:10")
        if colon and not (steps.isascii() and steps.isdigit() and int(steps) > 0):
            raise ValueError(f"on_bad_loss={text!r}: give the steps to go back as a whole number, as in rollback:10")
        return Policy(cast(Kind, kind), int(steps or 0))


@final
@dataclass(frozen=True)
class BadLosses:
    """The losses of a run so far, as far as judging the next one needs them, and what went wrong."""

    losses: tuple[float, ...] = ()
    """Largest loss of each of the last :data:`WINDOW` steps that were made."""
    gradients: tuple[float, ...] = ()
    """Largest size of their projected gradients, as they were used."""
    scale: float = 0.0
    """Largest size of a loss in the first :data:`WARM_UP` steps that were made."""
    made: int = 0
    """Steps of which the update was made."""
    in_a_row: int = 0
    """Steps since the last of these."""
    nonfinite: int = 0
    exploding: int = 0
    """Steps with a loss, or a gradient, that was not finite; steps with a loss that exploded."""
    skipped: int = 0
    clipped: int = 0
    rollbacks: int = 0
    """What became of them."""

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of steps, by name."""
        return {name: getattr(self, name) for name in ("nonfinite", "exploding", "skipped", "clipped", "rollbacks")}

    @property
    def total(self) -> int:
        """Steps that were not made as their losses said."""
        return self.skipped + self.clipped + self.rollbacks

    def after(self, loss: float, gradient: float) -> "BadLosses":
        """With a step that was made: its largest loss, and its largest projected gradient."""
        losses, gradients = ((*old, new)[-WINDOW:] for old, new in ((self.losses, loss), (self.gradients, gradient)))
        scale = max(self.scale, abs(loss)) if self.made < WARM_UP else self.scale
        return replace(self, losses=losses, gradients=gradients, scale=scale, made=self.made + 1, in_a_row=0)


def loss_limit(seen: BadLosses) -> float:
    """Above it a loss explodes: median of the last losses + :data:`EXPLODING` times the largest size of the first; infinite
    during the warm-up, and where the first losses were all 0."""
    return median(seen.losses) + EXPLODING * seen.scale if seen.made >= WARM_UP and seen.scale else math.inf


def explodes(loss: float, seen: BadLosses) -> bool:
    """Whether a finite loss lies above :func:`loss_limit`."""
    return loss > loss_limit(seen)


def gradient_limit(seen: BadLosses) -> float:
    """Largest size of a projected gradient under ``clip``: :data:`CLIP` times the running median of sizes; infinite during the
    warm-up, and where the median is 0."""
    middle = median(seen.gradients) if seen.made >= WARM_UP else 0.0
    return CLIP * middle if middle else math.inf


@final
class StepCheck:
    """Judges the estimates of one step, between its evaluations and its update."""

    def __init__(self, policy: Policy, seen: BadLosses) -> None:
        self._policy, self._before = policy, seen
        self.seen = seen
        """With this step, once it has been judged good."""

    def __call__(self, estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
        """The estimates to update by.

        Raises:
            BadLoss: the update must not be made.
        """
        sizes = [abs(estimate.projected_gradient) for estimate in estimates]
        limit = self.judge(max(loss for estimate in estimates for loss in estimate.losses), max(sizes))
        clipped = (max(-limit, min(limit, estimate.projected_gradient)) for estimate in estimates)
        return tuple(replace(e, projected_gradient=g) for e, g in zip(estimates, clipped, strict=True))

    def judge(self, loss: float, gradient: float) -> float:
        """What sizes of gradients are bounded by; infinite where this step's need no bound. Arguments and errors as of
        :meth:`BadLosses.after` and :meth:`__call__`."""
        seen = self._before
        if not math.isfinite(gradient):
            raise BadLoss(f"the projected gradient is {gradient}: lower lr or epsilon, or look for overflowing inputs", loss)
        if exploded := explodes(loss, seen):
            seen = replace(seen, exploding=seen.exploding + 1)
            if self._policy.kind != "clip":
                raise BadLoss(
                    f"the loss is {loss:.4g}, above {loss_limit(seen):.4g}, where it counts as exploding: lower lr, or leave "
                    "out such steps with on_bad_loss skip",
                    loss,
                    exploded,
                )
        limit = gradient_limit(seen) if self._policy.kind == "clip" else math.inf
        if gradient > limit:
            seen = replace(seen, clipped=seen.clipped + 1)
        self.seen = seen.after(loss, min(gradient, limit))
        return limit if gradient > limit else math.inf


def dropped(seen: BadLosses, error: FloatingPointError, rolled_back: bool) -> BadLosses:
    """With a step whose update was not made because of ``error``.

    Raises:
        FloatingPointError: it is the last of :data:`IN_A_ROW`.
    """
    if seen.in_a_row + 1 >= IN_A_ROW:
        raise FloatingPointError(
            f"{IN_A_ROW} steps in a row had bad losses, and no update was made: lower lr; the last: {error}"
        ) from error
    exploded = isinstance(error, BadLoss) and error.exploded
    return replace(
        seen,
        in_a_row=seen.in_a_row + 1,
        nonfinite=seen.nonfinite + (not exploded),
        exploding=seen.exploding + exploded,
        skipped=seen.skipped + (not rolled_back),
        rollbacks=seen.rollbacks + rolled_back,
    )
