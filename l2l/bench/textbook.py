"""The textbook step: four passes over the weights, each with noise drawn anew from a reset seed.

Malladi et al. 2023, arXiv:2305.17333, Algorithm 1. Every tensor of noise is materialised and every pass makes a new
tensor of weights, in the dtype of the weights: in bfloat16 this drifts and loses most of an update. Kept for
comparison only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l2l.estimators.base import Closure, finite_loss


def textbook_step(
    parameters: Sequence[nn.Parameter], closure: Closure, seed: int, lr: float = 1e-6, epsilon: float = 1e-3
) -> float:
    """One step; the mean of the two losses. Torch's global random state is reset four times.

    Raises:
        FloatingPointError: a loss is not finite; the weights stay perturbed then.
    """
    _perturb(parameters, seed, 1.0, epsilon)
    plus = finite_loss(closure)
    _perturb(parameters, seed, -2.0, epsilon)
    minus = finite_loss(closure)
    _perturb(parameters, seed, 1.0, epsilon)
    projected_gradient = (plus - minus) / (2 * epsilon)
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data = parameter.data - lr * projected_gradient * _noise(parameter)
    return (plus + minus) / 2


def _perturb(parameters: Sequence[nn.Parameter], seed: int, sign: float, epsilon: float) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data = parameter.data + sign * _noise(parameter) * epsilon


def _noise(like: Tensor) -> Tensor:
    return torch.normal(mean=0.0, std=1.0, size=like.shape, dtype=like.dtype, device=like.device)
