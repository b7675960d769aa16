"""DiZO's searches over how far each block stands from where training began, as a share of how far it stands now.

Tan et al. 2025, arXiv:2502.03304. Losses are read where ``stand_at(ratios)`` brings the blocks; ratios start at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure, finite_loss

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
