"""Input-side directions kept for weight matrices, and the noise along them.

A block [m, n] with a basis V [n, r] is perturbed along sqrt(n / r) * R V^T beside its dense noise, R [m, r] being standard
noise of the same key under a name of its own. The factor makes the mean square of a coordinate 1, as that of dense
noise is: E||R V^T||^2 = m * r where the columns of V are orthonormal."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from l2l.noise import Distribution, Key, noise_dot, standard_noise
from l2l.params.blocks import Block, Blocks

ORTHONORMAL = 1e-4
"""How far V^T V may be from the identity, in any entry."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns V_b [n, r] for some blocks. Two are equal only where they are the same object.

    The vectors are not copied: they must not change as long as a perturbation or a pending move uses them. They are
    checked at the first use; see :meth:`check`.
    """

    vectors: Mapping[int, torch.Tensor]
    """By index of the block; best float32, on the block's device."""

    def check(self, blocks: Blocks) -> None:
        """Raise ValueError, naming the block, where a basis is none for these blocks."""
        for index, vectors in self.vectors.items():
            if not 0 <= index < len(blocks):
                raise ValueError(f"a basis is given for block {index}, but there are {len(blocks)} blocks")
            problem = _problem(blocks[index], vectors)
            if problem is not None:
                raise ValueError(f"basis of block {blocks[index].name!r} {problem}")

    def spread(self, index: int) -> float:
        """sqrt(n / r) of a block; 0 where it has no basis."""
        vectors = self.vectors.get(index)
        return 0.0 if vectors is None else math.sqrt(vectors.shape[0] / vectors.shape[1])


def _problem(block: Block, vectors: torch.Tensor) -> str | None:
    if block.tensor.ndim != 2:
        return f"has no place: the block has shape {list(block.tensor.shape)}, and only a matrix can have one"
    n, shape = block.tensor.shape[1], list(vectors.shape)
    if vectors.ndim != 2 or shape[0] != n or not 1 <= shape[1] <= n:
        return f"has shape {shape}: it must be [{n}, r] with r from 1 to {n}"
    if not vectors.is_floating_point() or not bool(torch.isfinite(vectors).all()):
        return "holds a value that is not a finite number"
    with torch.no_grad():  # float64 is never made in less
        gram = vectors.double().t() @ vectors.double()
        away = (gram - torch.eye(shape[1], dtype=gram.dtype, device=gram.device)).abs().max().item()
    return None if away <= ORTHONORMAL else f"has columns that are not orthonormal: V^T V is off by {away:.1e}"


def basis_name(name: str) -> str:
    """Of the noise R of a block: what it is keyed by in place of the block's own name."""
    return f"{name}#basis"


def low_rank_noise(
    name: str, vectors: torch.Tensor, key: Key, rows: int, distribution: Distribution = "gaussian"
) -> torch.Tensor:
    """sqrt(n / r) * R V^T [rows, n] of a block, written out: the specification. Walking never needs it whole."""
    n, r = vectors.shape
    noise = standard_noise(basis_name(name), key, torch.Size((rows, r)), distribution, vectors.dtype, vectors.device)
    with torch.no_grad(), full_precision(vectors.device):
        return math.sqrt(n / r) * (noise @ vectors.t())


def low_rank_dot(
    name: str, vectors: torch.Tensor, key: Key, gradient: torch.Tensor, distribution: Distribution = "gaussian"
) -> float:
    """<sqrt(n / r) * R V^T, G> for a gradient G [m, n] of the block: sqrt(n / r) * <R, G V>, from m * r numbers."""
    n, r = vectors.shape
    with torch.no_grad(), full_precision(vectors.device):
        along = gradient.detach().to(vectors.dtype) @ vectors
    return math.sqrt(n / r) * noise_dot(along.contiguous().view(-1), basis_name(name), key, distribution)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices are made in float32, whatever the process has chosen for speed (TF32, autocast).

    A move that brings theta back and updates it is one product: rounded to fewer bits, it would lose the update.
    """
    before = [getattr(module, name) for module, name, _ in _SWITCHES]
    try:
        for module, name, exact in _SWITCHES:
            setattr(module, name, exact)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (module, name, _), value in zip(_SWITCHES, before, strict=True):
            setattr(module, name, value)


_MATMUL = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
_WAYS: tuple[tuple[str, Any], ...] = (
    ("fp32_precision", "ieee"),
    ("allow_tf32", False),
)  # the second where torch does not know the first
_SWITCHES: list[tuple[Any, str, Any]] = [
    known[0] for owner in _MATMUL if (known := [(owner, name, exact) for name, exact in _WAYS if hasattr(owner, name)])
]
"""What makes matrix products less precise: (owner, attribute, its value for full precision)."""
