"""ZO-AdaMU: momentum enters the search direction, not the update.

Jiang et al. 2023, arXiv:2312.15184. With a history m of zeros at first, and per coordinate
zc ~ N(0, alpha) and zh ~ N(m, 1 - alpha), the direction is u = beta1 * zc + (1 - beta1) * zh, the step g * u / sqrt(v + eps)
with v = beta2 * zc^2 + (1 - beta2) * zh^2, and m becomes u. All three weights are annealed from 1 by one curve: for the first
``explore`` of the run u is plain noise, and the history takes over until ``settle`` of it. Differs from the released code:
- u, v and m are made of the very noise of the evaluation (the code updates along another mix than it perturbed by);
- the curve depends on the step alone (the code shortens it a little at every call, so by how many tensors there are);
- m keeps its sign: g * u and v are the same for u and -u and the noise is symmetric, so that the code's sign(g) changes
  no step's distribution;
- a weight that has come down to 0 stays there (the code's beta2 rises again by 0.01).
The lengths of the phases are the code's, 1024 of 20 000 steps and 80 %, as fractions of the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch

from l2l.methods import base
from l2l.methods.base import Block, Blocks, Direction, Distribution, Estimates, Key, PerturbedParameters, StepContext
from l2l.noise import NoiseTerm, TensorSlice, add_noise, standard_deviation
from l2l.params.operators import factor

BENDS = {"alpha": 1.0, "beta1": 0.1, "beta2": 1.5}
"""How much faster than a cosine over the whole run each weight falls."""
UNKNOWN_HORIZON = 20_000
"""Steps of a run of unknown length: that of the paper's runs."""


@dataclass(frozen=True)
class AdaMUState:
    """The last direction, a tensor per block."""

    history: tuple[torch.Tensor, ...]


@final
class Mixed(base.DirectionOperator):
    """Fresh noise and noise about the history. Of mean square 1 at first; then as large as the history makes it.

    Args:
        alpha: variance of the fresh noise; that about the history has 1 - alpha.
        beta1: weight of the fresh noise.
    """

    def __init__(self, history: Sequence[torch.Tensor], alpha: float, beta1: float) -> None:
        self._history, self._alpha, self._beta1 = history, alpha, beta1

    def parts(self, block: Block, index: int, key: Key, distribution: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
        """The fresh noise zc and the noise about the history zh."""
        past = self._history[index]
        fresh = torch.zeros_like(past)
        unit = math.sqrt(self._alpha) / standard_deviation(distribution)
        add_noise([TensorSlice(fresh.view(-1), block.name)], [NoiseTerm(key, [(unit,)], distribution)])
        about = factor(block, "history", key, tuple(block.tensor.shape), distribution)
        return fresh, about.mul_(math.sqrt(1 - self._alpha)).add_(past)

    def write(self, block: Block, index: int, key: Key, distribution: Distribution) -> torch.Tensor:
        fresh, about = self.parts(block, index, key, distribution)
        return fresh.mul_(self._beta1).add_(about, alpha=1 - self._beta1)


@final
@dataclass(frozen=True)
class AdaMU(base.Method[AdaMUState]):
    """Directions that remember the last one, and steps divided by their size."""

    info: ClassVar = base.MethodInfo("Jiang et al. 2023, arXiv:2312.15184", "1P, at least float32")
    accumulates = 1
    positive = ("eps",)
    leaves_span = True
    num_directions: int = field(default=1, init=False)
    explore: float = 0.0512
    """Fraction of the run with directions of plain noise."""
    settle: float = 0.8
    """Fraction of the run after which nothing is annealed any more."""
    eps: float = 1e-8
    """Under the root of the mean square."""
    horizon: int | None = None
    """Steps of the run; None: 20 000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_counts(horizon=1 if self.horizon is None else self.horizon)
        if not 0 <= self.explore < self.settle <= 1:
            raise ValueError(f"explore={self.explore} must lie below settle={self.settle}, both between 0 and 1")

    def init(self, blocks: Blocks) -> AdaMUState:
        return AdaMUState(base.accumulators(blocks))

    def weight(self, name: str, step: int) -> float:
        """Alpha, beta1 or beta2 at a step."""
        total = float(self.horizon or UNKNOWN_HORIZON)
        first, last = self.explore * total, self.settle * total
        if step < first:
            return 1.0
        done = min(step, last) - first
        length = total - BENDS[name] * (total - last) * done / (last - first)
        return 0.0 if done >= length else 0.5 + 0.5 * math.cos(math.pi * done / length)

    def _mixed(self, state: AdaMUState, step: int) -> Mixed:
        return Mixed(state.history, self.weight("alpha", step), self.weight("beta1", step))

    def direction(self, blocks: Blocks, state: AdaMUState, key: Key) -> Direction:
        return self.unit_direction(blocks, key, self._mixed(state, key.step))

    def update_(self, theta: PerturbedParameters, state: AdaMUState, estimates: Estimates, context: StepContext) -> AdaMUState:
        key, beta2 = estimates[0].direction.key, self.weight("beta2", context.key.step)
        mixed = self._mixed(state, context.key.step)

        def delta(index: int) -> torch.Tensor:
            block = theta.blocks[index]
            moved = base.gradient(theta.blocks, index, estimates)  # several where groups of blocks were evaluated in turn
            direction = mixed.write(block, index, key, self.distribution)
            fresh, about = mixed.parts(block, index, key, self.distribution)
            state.history[index].copy_(direction)
            root = fresh.square_().mul_(beta2).addcmul_(about, about, value=1 - beta2).add_(self.eps).sqrt_()
            return moved.div_(root)

        theta.add_dense_each(delta, [-rate for rate in context.lr])
        return state
