"""CurvZO: MeZO on a few blocks at a time, sampled more often where the loss has proved sensitive.

Wang et al. 2026, arXiv:2603.21725, with named tensors as blocks. Block i takes part with probability pi_i = min(1, c * p_i), p
being a mixture of the normalized sensitivities and the uniform distribution, c such that sum pi = budget * count; it moves by
(g / pi_i) z_i, which is unbiased whatever the probabilities. Sensitivities follow |g|, budget and mixture how evenly they are
spread. Differs from the paper, and from a re-implementation of it, in
- sampling again where no block takes part, and dividing by the probability of taking part given that some do: the
  re-implementation then takes the likeliest block and divides by its unchanged pi, which is biased,
- a running mean of |g| that begins with the first one, not with almost 0, which makes the first sensitivities tenfold,
- |z_i|^2, in the weights of sensitivities, taken as its mean: the number of coordinates.
"""

import math
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar, final

import torch

from l2l.methods.base import Blocks, Direction, Estimates, Key, Method, MethodInfo, PerturbedParameters, StepContext, descend

START, FADING = 0.01, 0.1
"""Sensitivity before the first step; weight of the newest value in sensitivities, the mean of |g| and the budget."""
LOWEST = 1e-12
"""Least sensitivity."""
LEAST, MOST = 0.1, 0.8
"""Bounds of the budget, once it follows the sensitivities."""


@dataclass(frozen=True)
class CurvZOState:
    """Running statistics of the blocks."""

    sensitivity: torch.Tensor
    """[count of blocks], float64."""
    slope: float
    """Running mean of |g|; 0 before the first step."""
    budget: float
    """Fraction of the blocks that take part, on average."""
    mixture: float
    """Weight of the sensitivities, against the uniform distribution, in the probabilities."""


@final
@dataclass(frozen=True)
class CurvZO(Method[CurvZOState]):
    """theta_i -= lr * (g / pi_i) * z_i in blocks that are sampled by their sensitivity."""

    info: ClassVar = MethodInfo("Wang et al. 2026, arXiv:2603.21725", "8 bytes per block")
    counts = ("adapt",)
    budget: float = 0.4
    """Fraction of the blocks that take part at first, on average, at least one block; 1 stays 1, and is MeZO."""
    adapt: int = 20
    """Steps between changes of budget and mixture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget} must be above 0 and at most 1, the fraction of blocks that take part")

    def state_bytes(self, blocks: Blocks) -> int:
        return 8 * len(blocks)

    def init(self, blocks: Blocks) -> CurvZOState:
        return CurvZOState(torch.full((len(blocks),), START, dtype=torch.float64), 0.0, self.budget, FADING)

    def direction(self, blocks: Blocks, state: CurvZOState, key: Key) -> Direction:
        part = sample_blocks(inclusion(state), blocks, key)
        return Direction(key, tuple(float(i in part) for i in range(len(blocks))), self.distribution)

    def update_(
        self, theta: PerturbedParameters, state: CurvZOState, estimates: Estimates, context: StepContext
    ) -> CurvZOState:
        pi = inclusion(state)
        given = pi / (1 - torch.prod(1 - pi))  # that some block takes part
        descend(theta, estimates, [lr / p for lr, p in zip(context.lr, given.tolist(), strict=True)])
        sizes = torch.tensor([block.numel for block in theta.blocks], dtype=torch.float64)
        for estimate in estimates:
            # Sensitivities of the blocks that took part move towards |g| over its mean times their share of the energy.
            steep, part = abs(estimate.projected_gradient), torch.tensor([bool(sigma) for sigma in estimate.direction.sigma])
            slope = (1 - FADING) * state.slope + FADING * steep if state.slope else steep
            share = torch.where(part, sizes / given**2, 0.0)
            target = (steep / slope if slope else 0.0) * share / share.sum().clamp(min=1e-300)
            moved = torch.lerp(state.sensitivity, target, FADING).clamp(min=LOWEST)
            state = replace(state, slope=slope, sensitivity=torch.where(part, moved, state.sensitivity))
        due = self.budget < 1 and len(sizes) > 1 and (context.key.step + 1) % self.adapt == 0
        return adapt_budget(state) if due else state


def inclusion(state: CurvZOState) -> torch.Tensor:
    """pi [count]: its sum is budget * count, at least 1."""
    number, s = len(state.sensitivity), state.sensitivity
    wanted = min(number, max(1.0, state.budget * number))
    p = state.mixture * s / s.sum() + (1 - state.mixture) / number
    if wanted >= number:
        return torch.ones_like(p)
    low, high = 0.0, 1 / p.min().item()
    for _ in range(100):  # until the bounds touch
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * p).clamp(max=1).sum() < wanted else (low, middle)
    return (high * p).clamp(max=1)


def sample_blocks(pi: torch.Tensor, blocks: Blocks, key: Key) -> frozenset[int]:
    """The blocks that take part under ``key``, each independently with its probability; never none."""
    limits = [probability * 2**32 for probability in pi.tolist()]
    for attempt in count():
        words = [key.words(f"{name}#takes part, {attempt}")[0] for name in blocks.names]
        part = frozenset(i for i, (word, limit) in enumerate(zip(words, limits, strict=True)) if word < limit)
        if part:
            return part
    raise AssertionError("unreachable")


def adapt_budget(state: CurvZOState) -> CurvZOState:
    """Budget and mixture by how evenly the sensitivities are spread, 1 where they are equal."""
    s, number = state.sensitivity, len(state.sensitivity)
    shares = s / s.sum()
    support = (s.sqrt().sum() ** 2 / (number * s.sum())).item()
    entropy = -torch.special.xlogy(shares, shares).sum().item() / math.log(number)
    raw = LEAST + (MOST - LEAST) * (0.7 * support + 0.3 * (1 - entropy))
    budget = min(max((1 - FADING) * state.budget + FADING * raw, LEAST), MOST)
    mixture = min(1 - entropy, 1 - 1e-4 / budget)
    return replace(state, budget=budget, mixture=min(max(mixture, 0.05), 0.5))
