"""PseuZO: finite differences of the model's outputs, weighed with the exact gradient of the loss with respect to them.

Yue et al., NeurIPS 2025 (PseuZO). With outputs o at theta, e = dL/do by a backward pass through the loss alone, and o+
at theta + epsilon z: g = <e, o+ - o> / epsilon. Changes of outputs are kept for a while, (o+ - o) z^T / epsilon being
an estimate of the model's Jacobian that e of a later batch can weigh as well: theta -= lr * sum_j decay^j <e, (o+ -
o)_j> / epsilon * z_j. Without a window it is the one-sided estimate up to the curvature of the loss in its outputs.
Differs from the released code in that
- the outputs are found in any closure: all that the loss is made of once the last parameter has been read (logits,
  say; the code takes the last hidden state, and misses the effect of moving a trained head). Where a loss cannot be
  followed, as behind a float or where both passes take different paths, the loss itself is the output: the one-sided
  estimate;
- kept changes are of other batches: they are cut to the common size from their ends in each dimension, as the code
  does with sequences, and left out where there are more or fewer outputs;
- Rademacher noise has plus and minus one (the code's has minus one and zero).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch

from l2l.estimators import Outputs
from l2l.methods import base
from l2l.methods.base import Blocks, Direction, Estimate, Estimates, Key, LossEvaluator, PerturbedParameters, StepContext


@dataclass(frozen=True)
class PseuZOState:
    """The window, its newest change first."""

    steps: tuple[int, ...] = ()
    """Step of each change, from whose key its direction is made."""
    changes: tuple[tuple[torch.Tensor, ...], ...] = ()
    """o+ - o of each output, at least float32."""
    pulled: tuple[tuple[Direction, float], ...] = ()
    """The older directions and their weights, within a step."""


@final
@dataclass(frozen=True)
class PseuZO(base.CustomEstimator[PseuZOState]):
    """The exact gradient of the loss at the model's outputs, and finite differences of these."""

    info: ClassVar = base.MethodInfo("Yue et al., NeurIPS 2025 (PseuZO)", "changes of the outputs, at most window_bytes")
    counts = ("window", "window_bytes")
    fractions = ("decay",)
    num_directions: int = field(default=1, init=False)
    window: int = 4
    """Steps whose changes of outputs are used, this step's among them."""
    decay: float = 0.5
    """Weight of a change per step of its age."""
    window_bytes: int = 2**26
    """Most bytes of changes that are kept: the oldest go first. Where a single one has more (logits of many tokens), none
    is kept, and every step uses its own change alone."""

    def state_bytes(self, blocks: Blocks) -> int:
        """At most: the size of the outputs is the loss's."""
        return self.window_bytes if self.window > 1 else 0

    def init(self, blocks: Blocks) -> PseuZOState:
        return PseuZOState()

    def estimate(self, evaluator: LossEvaluator, state: PseuZOState) -> tuple[Estimates, PseuZOState]:
        blocks, center, plus = evaluator.theta.blocks, Outputs(), Outputs()
        u = evaluator.transform(self.direction(blocks, state, evaluator.key))
        bare = replace(evaluator, transform=lambda direction: direction)
        loss_center = bare.watched_center(center.during, u)
        pull = center.gradients()
        loss_plus = replace(bare, closure=lambda: plus.during(evaluator.closure)).along(u, self.epsilon)
        kept: list[tuple[torch.Tensor, ...]] = []  # this step's changes, where there are any

        def weigh() -> list[float]:
            """The slope, and of each older change its step and weight."""
            if [tensor.shape for tensor in center.tensors] != [tensor.shape for tensor in plus.tensors]:
                return [(loss_plus - loss_center) / self.epsilon]
            wide = [base.accumulation_dtype(tensor.dtype) for tensor in center.tensors]
            outputs = zip(center.tensors, plus.tensors, wide, strict=True)
            kept.append(tuple(there.to(dtype) - here.to(dtype) for here, there, dtype in outputs))
            ages = [evaluator.key.step - step for step in state.steps]
            weights = [
                self.decay**age * _weighed(pull, change) / self.epsilon for age, change in zip(ages, state.changes, strict=True)
            ]
            return [
                _weighed(pull, kept[0]) / self.epsilon,
                *(x for pair in zip(state.steps, weights, strict=True) for x in pair),
            ]

        slope, *older = evaluator.reading(weigh)
        keys = [Key(evaluator.key.seed, int(step)) for step in older[::2]]
        along = (evaluator.transform(self.direction(blocks, state, key)) for key in keys)
        pulled = tuple(zip(along, older[1::2], strict=True))
        steps = (evaluator.key.step, *state.steps) if kept else state.steps
        return (Estimate(u, loss_plus, None, slope, loss_center),), PseuZOState(steps, (*kept, *state.changes), pulled)

    def update_(
        self, theta: PerturbedParameters, state: PseuZOState, estimates: Estimates, context: StepContext
    ) -> PseuZOState:
        base.descend(theta, estimates, context.lr)
        for direction, weight in state.pulled:
            theta.add(direction, [-rate * weight for rate in context.lr])
        recent = [i for i, step in enumerate(state.steps) if context.key.step - step < self.window - 1]
        sizes = [sum(tensor.nbytes for tensor in state.changes[i]) for i in recent]
        recent = [i for k, i in enumerate(recent) if sum(sizes[: k + 1]) <= self.window_bytes]
        return PseuZOState(tuple(state.steps[i] for i in recent), tuple(state.changes[i] for i in recent))


def _weighed(pull: Sequence[torch.Tensor], changes: Sequence[torch.Tensor]) -> float:
    """<e, o+ - o> over the common part of both; 0 where the numbers of outputs or dimensions differ."""
    if [tensor.ndim for tensor in pull] != [tensor.ndim for tensor in changes]:
        return 0.0
    total = 0.0
    for own, change in zip(pull, changes, strict=True):
        ends = tuple(slice(-min(a, b), None) if min(a, b) else slice(0) for a, b in zip(own.shape, change.shape, strict=True))
        total += torch.sum(own[ends].to(change.dtype) * change[ends], dtype=torch.float64).item()
    return total
