"""DiZO: MeZO, and every few steps a search for how far each block should stand from its pretrained value.

Tan et al. 2025, arXiv:2502.03304. With the distance D = theta - anchor of a projected block, a search chooses a ratio
r and sets theta = anchor + r * D (gamma = r * |D| in the paper). Differs from it in that
- the blocks projected are found by structure, in any architecture, or by a pattern over their names (the paper projects
  key and value projections: ``projected=r"\\.(k|v)_proj\\.weight$"`` where these are separate blocks),
- ratios are applied to a copy of D, so that looking at a projection leaves no rounding behind,
- the first-order search starts at r = 1 and works on the ratio, so that its step does not depend on |D|.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Estimate, read_loss
from l2l.methods.base import Method, StepContext, check_counts, check_positive, descend
from l2l.noise import Distribution, Key, standard_noise
from l2l.perturb import Direction, Theta


@dataclass(frozen=True)
class DiZOState:
    """The projected blocks as they were before the first step."""

    anchor: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class DiZO(Method[DiZOState]):
    """MeZO with learned layer-wise projections. Extra memory: the projected blocks, twice during a search."""

    epsilon: float = 1e-3
    draws: int = 1
    distribution: Distribution = "gaussian"
    interval: int = 50
    """Steps between searches."""
    search: Literal["zo", "fo"] = "zo"
    """``zo``: two-point estimates over the ratios. ``fo``: Adam on the ratios, with backward passes."""
    iterations: int = 10
    """Iterations of one search, each on a further batch: two forward passes (zo), or a forward and a backward (fo)."""
    epsilon_projection: float = 0.1
    """How far the zo search looks along gamma."""
    step_size: float = 2.0
    """Step of the zo search, in units of |D|."""
    fo_lr: float = 0.1
    """Adam's learning rate on the ratios."""
    fo_penalty: float = 1e-3
    """Weight of sum |gamma| in the fo search."""
    clip: float = 0.2
    """A ratio stays within 1 - clip and 1 + clip of one search."""
    projected: str | None = None
    """Regular expression over block names; None: matrices of attention modules, else all matrices but embeddings."""

    def __post_init__(self) -> None:
        check_positive(
            epsilon=self.epsilon,
            epsilon_projection=self.epsilon_projection,
            step_size=self.step_size,
            fo_lr=self.fo_lr,
            clip=self.clip,
        )
        check_counts(draws=self.draws, interval=self.interval, iterations=self.iterations)
        if self.search not in ("zo", "fo"):
            raise ValueError(f"search={self.search!r} must be 'zo' or 'fo'")

    def init(self, blocks: Blocks) -> DiZOState:
        return DiZOState(tuple(blocks[i].tensor.detach().clone() for i in projected_blocks(blocks, self.projected)))

    def direction(self, blocks: Blocks, state: DiZOState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def update_(self, theta: Theta, state: DiZOState, estimates: Sequence[Estimate], context: StepContext) -> DiZOState:
        descend(theta, estimates, context.lr)
        if (context.key.step + 1) % self.interval == 0:
            self._project(theta, state, context)
        return state

    def _project(self, theta: Theta, state: DiZOState, context: StepContext) -> None:
        theta.home()
        indices = projected_blocks(theta.blocks, self.projected)
        here = {i: theta.value(i).clone() for i in indices}
        anchor = dict(zip(indices, state.anchor, strict=True))
        norms = {i: torch.linalg.vector_norm(here[i].double() - anchor[i].double()).item() for i in indices}
        moved = [i for i in indices if norms[i] > 0]  # an untouched block has no direction to be projected along

        def stand_at(ratios: dict[int, float]) -> None:
            theta.interpolate(anchor, here, ratios)

        if not moved:
            return
        if self.search == "zo":
            ratios = self._search_zo(stand_at, {i: norms[i] for i in moved}, theta.blocks, context)
        else:
            deltas = {i: here[i] - anchor[i].to(here[i].dtype) for i in moved}
            ratios = self._search_fo(stand_at, deltas, {i: norms[i] for i in moved}, theta.blocks, context)
        stand_at(ratios)

    def _search_zo(
        self,
        stand_at: Callable[[dict[int, float]], None],
        norms: dict[int, float],
        blocks: Blocks,
        context: StepContext,
    ) -> dict[int, float]:
        ratios = dict.fromkeys(norms, 1.0)
        for iteration in range(self.iterations):
            closure = context.fresh(iteration)
            key = context.key.with_draw(iteration)
            z = {i: clipped_draw(key, blocks[i].name, norms[i] * self.clip / self.epsilon_projection) for i in norms}
            reach = {i: self.epsilon_projection * z[i] / norms[i] for i in norms}
            stand_at({i: ratios[i] + reach[i] for i in norms})
            plus = read_loss(closure)
            stand_at({i: ratios[i] - reach[i] for i in norms})
            minus = read_loss(closure)
            slope = (plus - minus) / (2 * self.epsilon_projection)
            ratios = {i: self._clipped(ratios[i] - self.step_size * slope * z[i]) for i in norms}
        return ratios

    def _search_fo(
        self,
        stand_at: Callable[[dict[int, float]], None],
        deltas: dict[int, Tensor],
        norms: dict[int, float],
        blocks: Blocks,
        context: StepContext,
    ) -> dict[int, float]:
        indices = list(norms)
        ratio = torch.ones(len(indices), dtype=torch.float64, requires_grad=True)
        penalty = self.fo_penalty * torch.tensor([norms[i] for i in indices], dtype=torch.float64)
        adam = torch.optim.Adam([ratio], lr=self.fo_lr)
        chosen = Blocks(blocks[i] for i in indices)
        for iteration in range(self.iterations):
            stand_at(dict(zip(indices, ratio.tolist(), strict=True)))
            slopes = torch.zeros_like(ratio)

            def take(position: int, gradient: Tensor, slopes: Tensor = slopes) -> None:
                slopes[position] = torch.sum(gradient.double() * deltas[indices[position]].double()).item()

            consume_gradients(context.fresh(iteration), chosen, take)
            ratio.grad = slopes + penalty * ratio.detach().sign()
            adam.step()
            with torch.no_grad():
                ratio.clamp_(1 - self.clip, 1 + self.clip)
        return dict(zip(indices, ratio.tolist(), strict=True))

    def _clipped(self, ratio: float) -> float:
        return min(max(ratio, 1 - self.clip), 1 + self.clip)


def projected_blocks(blocks: Blocks, pattern: str | None) -> list[int]:
    """Indices of the blocks that DiZO projects: never none.

    Raises:
        ValueError: the pattern matches no block.
    """
    if pattern is not None:
        found = [i for i, block in enumerate(blocks) if re.search(pattern, block.name)]
        if not found:
            raise ValueError(f"projected={pattern!r} matches no block; names look like {blocks.names[0]!r}")
        return found
    matrices = [i for i, block in enumerate(blocks) if block.tensor.ndim >= 2 and not block.embedding]
    return [i for i in matrices if blocks[i].attention] or matrices or list(range(len(blocks)))


def clipped_draw(key: Key, name: str, limit: float) -> float:
    """A standard normal scalar of the projection search, clipped to +-limit; its stream is not the block's own."""
    value = standard_noise(f"{name}#projection", key, torch.Size([1]), dtype=torch.float64).item()
    return math.copysign(min(abs(value), limit), value)
