"""PseuZO: what a look does to the model's outputs, weighed with the loss's exact gradient with respect to them.

Yue et al., NeurIPS 2025 (PseuZO). With outputs o at theta, e = dL/do by a backward pass through the loss alone, and o+
at theta + epsilon z: g = <e, o+ - o> / epsilon. Changes of outputs are kept for a while, (o+ - o) z^T / epsilon being
an estimate of the model's Jacobian that e of a later batch can weigh as well: theta -= lr * sum_j decay^j <e, (o+ -
o)_j> / epsilon * z_j. Without a window it is the one-sided estimate but for the bend of the loss in its outputs.
Differs from the released code in that
- the outputs are found in any closure: all that the loss is made of once the last parameter has been read (logits,
  say; the code takes the last hidden state, and misses what moving a trained head does). Where a loss cannot be
  followed, as behind a float or where both passes take different ways, the loss itself is the output: the one-sided
  estimate;
- kept changes are of other batches: they are cut to the common size from their ends in each dimension, as the code
  does with sequences, and left out where there are more or fewer outputs;
- Rademacher noise has plus and minus one (the code's has minus one and zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from l2l.estimators.finite_difference import Estimate
from l2l.estimators.outputs import Outputs
from l2l.methods.base import (
    CustomEstimator,
    LossEvaluator,
    MethodInfo,
    StepContext,
    accumulation_dtype,
    check_counts,
    check_positive,
    descend,
)
from l2l.noise import Distribution, Key
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks


@dataclass(frozen=True)
class PseuZOState:
    """The window, its youngest change first."""

    steps: tuple[int, ...] = ()
    """Of each change, whose keys its direction has."""
    changes: tuple[tuple[Tensor, ...], ...] = ()
    """Of each output, o+ - o, at least float32."""
    pulled: tuple[tuple[Direction, float], ...] = ()
    """The older directions and their weights, while a step is under way."""


@final
@dataclass(frozen=True)
class PseuZO(CustomEstimator[PseuZOState]):
    """The loss's exact gradient at the model's outputs, and their changes. Extra memory: the window's changes."""

    info: ClassVar = MethodInfo("Yue et al., NeurIPS 2025 (PseuZO)", "changes of the outputs, at most window_bytes")
    epsilon: float = 1e-3
    distribution: Distribution = "gaussian"
    window: int = 4
    """Steps whose changes of outputs are used, this step's among them."""
    decay: float = 0.5
    """Weight of a change for each step that it is old."""
    window_bytes: int = 2**26
    """Most bytes of changes that are kept: the oldest go first. Where one alone has more (logits of many words), none
    is kept, and every step is by its own look."""
    num_directions: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_counts(window=self.window, window_bytes=self.window_bytes)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")

    @property
    def passes(self) -> float:
        return 2.0

    def state_bytes(self, blocks: Blocks) -> int:
        return self.window_bytes if self.window > 1 else 0

    def init(self, blocks: Blocks) -> PseuZOState:
        return PseuZOState()

    def direction(self, blocks: Blocks, state: PseuZOState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def estimate(self, evaluator: LossEvaluator, state: PseuZOState) -> tuple[tuple[Estimate, ...], PseuZOState]:
        blocks, at_home, away = evaluator.theta.blocks, Outputs(), Outputs()
        u = evaluator.transform(self.direction(blocks, state, evaluator.key))
        bare = replace(evaluator, transform=lambda direction: direction)
        watched = replace(bare, closure=lambda: at_home.during(evaluator.closure))
        # Half precision is read as the copies that looks make: norms and biases are float32 on both sides then.
        home = watched.center() if evaluator.theta.update is None else watched.along(u, 0.0)
        pull = at_home.gradients()
        plus = replace(bare, closure=lambda: away.during(evaluator.closure)).along(u, self.epsilon)
        changes = _changes(at_home.tensors, away.tensors)
        if changes is None:
            return (Estimate(u, plus, None, (plus - home) / self.epsilon, home),), replace(state, pulled=())
        older = [
            (self.decay ** (evaluator.key.step - step) * _weighed(pull, change) / self.epsilon, step)
            for step, change in zip(state.steps, state.changes, strict=True)
        ]
        pulled = tuple(
            (evaluator.transform(self.direction(blocks, state, Key(evaluator.key.seed, step))), weight)
            for weight, step in older
        )
        seen = Estimate(u, plus, None, _weighed(pull, changes) / self.epsilon, home)
        steps, kept = (evaluator.key.step, *state.steps), (changes, *state.changes)
        return (seen,), PseuZOState(steps, kept, pulled)

    def update_(
        self, theta: PerturbedParameters, state: PseuZOState, estimates: Sequence[Estimate], context: StepContext
    ) -> PseuZOState:
        descend(theta, estimates, context.lr)
        for direction, weight in state.pulled:
            theta.add(direction, [-rate * weight for rate in context.lr])
        young = [i for i, step in enumerate(state.steps) if context.key.step - step < self.window - 1]
        sizes = [sum(tensor.nbytes for tensor in state.changes[i]) for i in young]
        young = [i for k, i in enumerate(young) if sum(sizes[: k + 1]) <= self.window_bytes]
        return PseuZOState(tuple(state.steps[i] for i in young), tuple(state.changes[i] for i in young))


def _changes(home: Sequence[Tensor], away: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """What a look did to the outputs; None where there are not the same ones."""
    if [tensor.shape for tensor in home] != [tensor.shape for tensor in away]:
        return None
    wide = [accumulation_dtype(tensor.dtype) for tensor in home]
    return tuple(there.to(dtype) - here.to(dtype) for here, there, dtype in zip(home, away, wide, strict=True))


def _weighed(pull: Sequence[Tensor], changes: Sequence[Tensor]) -> float:
    """<e, o+ - o>, of what both have; 0 where there are not as many outputs."""
    if [tensor.ndim for tensor in pull] != [tensor.ndim for tensor in changes]:
        return 0.0
    total = 0.0
    for own, change in zip(pull, changes, strict=True):
        ends = tuple(
            slice(-min(a, b), None) if min(a, b) else slice(0) for a, b in zip(own.shape, change.shape, strict=True)
        )
        total += torch.sum(own[ends].to(change.dtype) * change[ends], dtype=torch.float64).item()
    return total
