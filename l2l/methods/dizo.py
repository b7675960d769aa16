r"""DiZO's searches over how far each block stands from where training began, as a share of how far it stands now.

Tan et al. 2025, arXiv:2502.03304. Losses are read where ``stand_at(ratios)`` brings the blocks; ratios start at 1.

DiZO: MeZO, and every few steps a search for how far each block should stand from its pretrained value.

Tan et al. 2025, arXiv:2502.03304. With the distance D = theta - anchor of a projected block, a search chooses a ratio
r and sets theta = anchor + r * D (gamma = r * |D| in the paper). Differs from it in that
- the blocks projected are found by structure, in any architecture, or by a pattern over their names (the paper projects
  key and value projections: ``projected=r"\.(k|v)_proj\.weight$"`` where these are separate blocks),
- ratios are applied to a copy of D, so that looking at a projection leaves no rounding behind,
- the first-order search starts at r = 1 and works on the ratio, so that its step does not depend on |D|.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor

from l2l.estimators.backward import consume_gradients
from l2l.estimators.finite_difference import Closure, Estimate, finite_loss
from l2l.methods.base import Method, MethodInfo, StepContext, check_counts, check_positive, descend
from l2l.noise import Distribution, Key, standard_noise
from l2l.params import Direction, PerturbedParameters
from l2l.params.blocks import Blocks

StandAt: TypeAlias = Callable[[dict[int, float]], None]
"""Sets each block listed to anchor + ratio * (theta - anchor)."""


def search_two_point(
    stand_at: StandAt,
    losses: Sequence[Closure],
    num_directions: Sequence[Mapping[int, float]],
    norms: Mapping[int, float],
    epsilon: float,
    step_size: float,
    clip: float,
) -> dict[int, float]:
    """Two-point estimates along random directions of gamma = ratio * norm, a closure and a draw per iteration.

    Two forward passes each. A ratio stays within 1 - clip and 1 + clip.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    ratios = dict.fromkeys(norms, 1.0)
    for closure, z in zip(losses, num_directions, strict=True):
        reach = {i: epsilon * z[i] / norms[i] for i in norms}
        stand_at({i: ratios[i] + reach[i] for i in norms})
        plus = finite_loss(closure)
        stand_at({i: ratios[i] - reach[i] for i in norms})
        minus = finite_loss(closure)
        slope = (plus - minus) / (2 * epsilon)
        ratios = {i: min(max(ratios[i] - step_size * slope * z[i], 1 - clip), 1 + clip) for i in norms}
    return ratios


def search_backward(
    stand_at: StandAt,
    losses: Sequence[Closure],
    blocks: Blocks,
    deltas: Mapping[int, Tensor],
    norms: Mapping[int, float],
    lr: float,
    penalty: float,
    clip: float,
) -> dict[int, float]:
    """Adam on the ratios, a forward and a backward pass per closure; ``penalty`` weighs sum |gamma|.

    Args:
        deltas: theta - anchor of each block searched over.

    Raises:
        FloatingPointError: a loss is not finite.
        TypeError: a closure's value carries no graph.
    """
    indices = list(norms)
    ratio = torch.ones(len(indices), dtype=torch.float64, requires_grad=True)
    weight = penalty * torch.tensor([norms[i] for i in indices], dtype=torch.float64)
    adam = torch.optim.Adam([ratio], lr=lr)
    chosen = Blocks(blocks[i] for i in indices)
    for closure in losses:
        stand_at(dict(zip(indices, ratio.tolist(), strict=True)))
        slopes = torch.zeros_like(ratio)

        def take(position: int, gradient: Tensor, slopes: Tensor = slopes) -> None:
            slopes[position] = torch.sum(gradient.double() * deltas[indices[position]].double()).item()

        consume_gradients(closure, chosen, take)
        ratio.grad = slopes + weight * ratio.detach().sign()
        adam.step()
        with torch.no_grad():
            ratio.clamp_(1 - clip, 1 + clip)
    return dict(zip(indices, ratio.tolist(), strict=True))


def clipped(value: float, limit: float) -> float:
    """The value, brought to within +- limit."""
    return math.copysign(min(abs(value), limit), value)


@dataclass(frozen=True)
class DiZOState:
    """The projected blocks as they were before the first step."""

    anchor: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class DiZO(Method[DiZOState]):
    """MeZO with learned layer-wise projections. Extra memory: the projected blocks, twice during a search."""

    info: ClassVar = MethodInfo("Tan et al. 2025, arXiv:2502.03304", "a copy of the projected blocks")
    epsilon: float = 1e-3
    num_directions: int = 1
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
        check_counts(num_directions=self.num_directions, interval=self.interval, iterations=self.iterations)
        if self.search not in ("zo", "fo"):
            raise ValueError(f"search={self.search!r} must be 'zo' or 'fo'")
        object.__setattr__(self, "differentiates", self.search == "fo")

    @property
    def passes(self) -> float:
        return 2.0 * self.num_directions + (2 if self.search == "zo" else 3) * self.iterations / self.interval

    def state_bytes(self, blocks: Blocks) -> int:
        chosen = [blocks[i].tensor for i in projected_blocks(blocks, self.projected)]
        return sum(tensor.numel() * tensor.element_size() for tensor in chosen)

    def init(self, blocks: Blocks) -> DiZOState:
        return DiZOState(tuple(blocks[i].tensor.detach().clone() for i in projected_blocks(blocks, self.projected)))

    def direction(self, blocks: Blocks, state: DiZOState, key: Key) -> Direction:
        return Direction(key, (1.0,) * len(blocks), self.distribution)

    def update_(
        self, theta: PerturbedParameters, state: DiZOState, estimates: Sequence[Estimate], context: StepContext
    ) -> DiZOState:
        descend(theta, estimates, context.lr)
        if (context.key.step + 1) % self.interval == 0:
            self._project(theta, state, context)
        return state

    def _project(self, theta: PerturbedParameters, state: DiZOState, context: StepContext) -> None:
        theta.restore()
        indices = projected_blocks(theta.blocks, self.projected)
        here = {i: theta.value(i).clone() for i in indices}
        anchor = dict(zip(indices, state.anchor, strict=True))
        norms = {i: torch.linalg.vector_norm(here[i].double() - anchor[i].double()).item() for i in indices}
        moved = [i for i in indices if norms[i] > 0]  # an untouched block has no direction to be projected along

        def stand_at(ratios: dict[int, float]) -> None:
            theta.interpolate(anchor, here, ratios)

        if not moved:
            return
        losses, far = [context.fresh(i) for i in range(self.iterations)], {i: norms[i] for i in moved}
        if self.search == "zo":
            candidates = [self._draw(context.key.with_draw(k), theta.blocks, far) for k in range(self.iterations)]
            ratios = search_two_point(
                stand_at, losses, candidates, far, self.epsilon_projection, self.step_size, self.clip
            )
        else:
            deltas = {i: here[i] - anchor[i].to(here[i].dtype) for i in moved}
            ratios = search_backward(
                stand_at, losses, theta.blocks, deltas, far, self.fo_lr, self.fo_penalty, self.clip
            )
        stand_at(ratios)

    def _draw(self, key: Key, blocks: Blocks, norms: Mapping[int, float]) -> dict[int, float]:
        return {i: clipped_draw(key, blocks[i].name, norms[i] * self.clip / self.epsilon_projection) for i in norms}


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
    return clipped(value, limit)
