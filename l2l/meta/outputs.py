"""From derivatives in a tuner's outputs to a scalar that autograd can follow to its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2l.tuners.tuner import Tuner


def differentiable(
    tuner: Tuner, features: Tensor, names: Sequence[str], sigma_gradient: Tensor, basis_gradient: Tensor | None = None
) -> Tensor:
    """sum_b sigma_b * gradient_b, with the same for basis_sigma: its gradient in the tuner's weights is the chain rule's.

    Args:
        features: [blocks, features] that the outputs are a function of.
        sigma_gradient: [blocks] derivative in sigma before normalisation.
        basis_gradient: [blocks] derivative in basis_sigma; None where there is no basis.
    """
    scales = tuner.scales(features, names)
    if scales.ndim == 1:
        return torch.sum(scales * sigma_gradient)
    inside = torch.zeros_like(sigma_gradient) if basis_gradient is None else basis_gradient
    return torch.sum(scales * torch.stack([sigma_gradient, inside], 1))


def reaching(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(found).sum(0) if found else None
