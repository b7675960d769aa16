"""Which backend adds the noise: the compiled one where it is available and fits, the reference otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from l2l.noise import native, reference
from l2l.noise.key import Distribution, Key

VARIABLE = "L2L_NOISE"
"""Environment variable that forces a backend: ``native`` or ``reference``."""


def active_backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that serves this device and dtype: ``native`` or ``reference``.

    Raises:
        ValueError: the environment variable names an unknown backend, or ``native`` where it cannot be had.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "native", "reference"):
        raise ValueError(f"{VARIABLE}={wanted!r} is not a noise backend; use auto, native or reference")
    fits = torch.device(device).type == "cpu" and dtype == torch.float32
    if wanted == "reference" or not fits:
        return "reference"
    if native.library() is not None:
        return "native"
    if wanted == "native":
        raise ValueError(f"{VARIABLE}=native, but no C compiler could build it; use {VARIABLE}=auto")
    return "reference"


def add_noise_(
    flat: Tensor,
    name: str,
    key: Key,
    scales: Sequence[float],
    distribution: Distribution = "gaussian",
    offset: int = 0,
) -> None:
    """Add noise in place: see :func:`l2l.noise.reference.add_noise_`, whose bits every backend reproduces.

    Raises:
        ValueError: ``flat`` is not contiguous, or a scale is not finite.
    """
    if not flat.is_contiguous():
        raise ValueError(f"noise for block {name!r} needs a contiguous tensor; its strides are {flat.stride()}")
    backend = native if active_backend(flat.device, flat.dtype) == "native" else reference
    backend.add_noise_(flat, name, key, scales, distribution, offset)
