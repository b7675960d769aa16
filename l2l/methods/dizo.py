r"""DiZO: MeZO, and every few steps a search for the distance of each block from its pretrained value.

Tan et al. 2025, arXiv:2502.03304. With the distance D = theta - anchor of a projected block, a search chooses a ratio
r and sets theta = anchor + r * D (gamma = r * |D| in the paper). Differs from it in that
- the blocks projected are found by structure, in any architecture, or by a pattern over their names (the paper projects
  key and value projections: ``projected=r"\.(k|v)_proj\.weight$"`` where these are separate blocks),
- ratios are applied to a copy of D, so that evaluating a projection leaves no rounding behind,
- the first-order search starts at r = 1 and works on the ratio, so that its step does not depend on |D|.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeAlias, final

import torch

from l2l.estimators import consume_gradients
from l2l.methods import base
from l2l.methods.base import Blocks, Closure, Estimates, Key, PerturbedParameters, StepContext
from l2l.noise import standard_noise

Floats: TypeAlias = Mapping[int, float]
"""A number for each projected block, by its index."""
SetRatios: TypeAlias = Callable[[dict[int, float]], None]
"""Sets each block listed to anchor + ratio * (theta - anchor)."""


@dataclass(frozen=True)
class DiZOState:
    """The projected blocks as they were before the first step."""

    anchor: tuple[torch.Tensor, ...]


@final
@dataclass(frozen=True)
class DiZO(base.Method[DiZOState]):
    """MeZO with searched layer-wise projections."""

    info: ClassVar = base.MethodInfo("Tan et al. 2025, arXiv:2502.03304", "1P of the projected blocks, twice in a search")
    positive = ("epsilon_projection", "step_size", "fo_lr", "clip")
    counts = ("interval", "iterations")
    interval: int = 50
    """Steps between searches."""
    search: Literal["zo", "fo"] = "zo"
    """``zo``: two-point estimates over the ratios. ``fo``: Adam on the ratios, with backward passes."""
    iterations: int = 10
    """Iterations of one search, each on a further batch: two forward passes (zo), or a forward and a backward (fo)."""
    epsilon_projection: float = 0.1
    """Distance of the zo search's evaluations along gamma."""
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
        super().__post_init__()
        base.check_choice("search", self.search, ("zo", "fo"))
        object.__setattr__(self, "differentiates", self.search == "fo")

    @property
    def passes(self) -> float:
        return super().passes + (2 if self.search == "zo" else 3) * self.iterations / self.interval

    def state_bytes(self, blocks: Blocks) -> int:
        return sum(blocks[i].tensor.nbytes for i in projected_blocks(blocks, self.projected))

    def scratch_bytes(self, blocks: Blocks) -> int:
        # a copy of theta during a search, and three float64 copies of a block while its distance is measured
        largest = max(blocks[i].numel for i in projected_blocks(blocks, self.projected))
        return self.state_bytes(blocks) * (2 if self.search == "fo" else 1) + 3 * 8 * largest

    def init(self, blocks: Blocks) -> DiZOState:
        return DiZOState(tuple(blocks[i].tensor.detach().clone() for i in projected_blocks(blocks, self.projected)))

    def update_(self, theta: PerturbedParameters, state: DiZOState, estimates: Estimates, context: StepContext) -> DiZOState:
        base.descend(theta, estimates, context.lr)
        if (context.key.step + 1) % self.interval == 0:
            self._project(theta, state, context)
        return state

    def _project(self, theta: PerturbedParameters, state: DiZOState, context: StepContext) -> None:
        theta.restore()
        indices = projected_blocks(theta.blocks, self.projected)
        here = {i: theta.value(i).clone() for i in indices}
        anchor = dict(zip(indices, state.anchor, strict=True))
        distances = {i: torch.linalg.vector_norm(here[i].double() - anchor[i].double()).item() for i in indices}
        norms = {i: norm for i, norm in distances.items() if norm > 0}  # an unmoved block cannot be projected
        if not norms:
            return
        set_ratios = partial(theta.interpolate, anchor, here)
        losses = [context.fresh(i) for i in range(self.iterations)]
        if self.search == "zo":
            ratios = self._search_two_point(set_ratios, losses, theta.blocks, norms, context.key)
        else:
            deltas = {i: here[i] - anchor[i].to(here[i].dtype) for i in norms}
            searched = context.reading(
                lambda: list(self._search_backward(set_ratios, losses, theta.blocks, norms, deltas).values())
            )
            ratios = dict(zip(norms, searched, strict=True))
        set_ratios(ratios)

    def _search_two_point(
        self, set_ratios: SetRatios, losses: Sequence[Closure], blocks: Blocks, norms: Floats, key: Key
    ) -> dict[int, float]:
        """Ratios by SGD on two-point estimates along random directions of gamma = ratio * norm, two forward passes each."""
        ratios, epsilon = dict.fromkeys(norms, 1.0), self.epsilon_projection
        low, high = 1 - self.clip, 1 + self.clip
        for draw, closure in enumerate(losses):
            own = key.with_draw(draw)
            # clipped, so that no evaluation moves a ratio by more than clip
            z = {i: clipped_normal(own, blocks[i].name, norm * self.clip / epsilon) for i, norm in norms.items()}
            reach, seen = {i: epsilon * z[i] / norms[i] for i in norms}, []
            for side in (1, -1):
                set_ratios({i: ratios[i] + side * reach[i] for i in norms})
                seen.append(base.finite_loss(closure))
            slope = (seen[0] - seen[1]) / (2 * epsilon)
            ratios = {i: min(max(ratios[i] - self.step_size * slope * z[i], low), high) for i in norms}
        return ratios

    def _search_backward(
        self,
        set_ratios: SetRatios,
        losses: Sequence[Closure],
        blocks: Blocks,
        norms: Floats,
        deltas: Mapping[int, torch.Tensor],
    ) -> dict[int, float]:
        """Ratios by Adam, a forward and a backward pass per closure; ``deltas`` are theta - anchor of each block."""
        ratio = torch.ones(len(norms), dtype=torch.float64, requires_grad=True)
        weight = self.fo_penalty * torch.tensor(list(norms.values()), dtype=torch.float64)
        adam = torch.optim.Adam([ratio], lr=self.fo_lr)
        indices, chosen = list(norms), Blocks(blocks[i] for i in norms)
        for closure in losses:
            set_ratios(dict(zip(indices, ratio.tolist(), strict=True)))
            slopes = torch.zeros_like(ratio)

            def take(position: int, gradient: torch.Tensor, slopes: torch.Tensor = slopes) -> None:
                slopes[position] = torch.sum(gradient.double() * deltas[indices[position]].double()).item()

            consume_gradients(closure, chosen, take)
            ratio.grad = slopes + weight * ratio.detach().sign()
            adam.step()
            with torch.no_grad():
                ratio.clamp_(1 - self.clip, 1 + self.clip)
        return dict(zip(indices, ratio.tolist(), strict=True))


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


def clipped_normal(key: Key, name: str, limit: float) -> float:
    """A standard normal number of the projection search, clipped to +-limit; its stream is not the block's own."""
    value = standard_noise(f"{name}#projection", key, torch.Size([1]), dtype=torch.float64).item()
    return max(-limit, min(limit, value))
