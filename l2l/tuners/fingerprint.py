"""Identity of the model that a tuner belongs to: names, shapes and kinds of its blocks, its ties, a hash of its weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from l2l.params import Block, Blocks
from l2l.params.blocks import named_parameters
from l2l.tuners.features import KINDS, kind_of

CHUNK = 1 << 20
"""Coordinates that are converted at a time: bounds the memory of :func:`weights_hash`."""


@dataclass(frozen=True)
class Fingerprint:
    """Names and shapes of all blocks of a model, frozen ones included. Kinds, ties and weights are not compared by ``==``."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...] = field(default=(), compare=False)
    """:func:`l2l.tuners.features.kind_of` each block; empty for tuners saved without."""
    ties: tuple[tuple[str, ...], ...] | None = field(default=None, compare=False)
    """Names that share a tensor, the block's own first; None: unknown."""
    weights: str | None = field(default=None, compare=False)
    """:func:`weights_hash` of the model; None: unknown."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or len(self.kinds) not in (0, len(self.names)):
            raise ValueError(f"the tuner's blocks have kinds that l2l does not know ({unknown[:1]}): get it again")
        sizes = [size for shape in self.shapes for size in shape]
        if len(set(self.names)) < len(self.names) or any(not isinstance(size, int) or size < 0 for size in sizes):
            raise ValueError("the tuner's blocks have names twice, or sizes that are no whole numbers: get it again")
        tied = [name for group in self.ties or () for name in group]
        if not all(isinstance(name, str) for name in tied) or not isinstance(self.weights, str | None):
            raise ValueError("the tuner's fingerprint holds ties or a hash that are no names: get it again")

    @staticmethod
    def of(model: torch.nn.Module, identity: bool = False) -> "Fingerprint":
        """Fingerprint of a model; with its identity, ties and the hash of the weights, which takes a pass over them."""
        blocks = Blocks.of(model, trainable=False)
        shapes = tuple(tuple(block.tensor.shape) for block in blocks)
        found = Fingerprint(blocks.names, shapes, tuple(map(kind_of, blocks)))
        return found.identified(model) if identity else found

    def identified(self, model: torch.nn.Module) -> "Fingerprint":
        """The same with ties and weights of a model."""
        return replace(self, ties=ties_of(model), weights=weights_hash(Blocks.of(model, trainable=False)))

    def identity(self) -> dict[str, Any]:
        """Ties and weights as JSON values; empty where neither is known."""
        known = {"ties": [list(group) for group in self.ties or ()], "weights": self.weights}
        return {} if self.ties is None and self.weights is None else known

    def blocks(self) -> Blocks:
        """Blocks of these names, shapes and kinds, without memory."""
        kinds = self.kinds or ("",) * len(self.names)
        return Blocks(
            Block(name, torch.empty(shape, device="meta"), kind.endswith("embedding"), kind.startswith("attention"))
            for name, shape, kind in zip(self.names, self.shapes, kinds, strict=True)
        )

    def differences(self, other: "Fingerprint") -> list[str]:
        """Blocks that ``other`` lacks, has in addition, or has in another shape; empty if they match in any order."""
        mine = dict(zip(self.names, self.shapes, strict=True))
        theirs = dict(zip(other.names, other.shapes, strict=True))
        lists = {
            "missing in the model": [name for name in mine if name not in theirs],
            "not in the tuner": [name for name in theirs if name not in mine],
            "of another shape": [name for name in mine if name in theirs and mine[name] != theirs[name]],
        }
        return [f"{len(names)} {label}: {format_names(names)}" for label, names in lists.items() if names]


def ties_of(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that share a tensor; the first of each is the block's name."""
    groups: dict[object, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        memory = parameter.data_ptr()
        groups.setdefault((memory, parameter.numel()) if memory else id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def weights_hash(blocks: Blocks) -> str | None:
    """Hash of the blocks' weights, independent of names and order: 32 digits; None without readable weights.

    It is taken of each block's sum, and sum of squares, of the bits of its weights in bfloat16 as whole numbers: equal on
    every device, and for a checkpoint loaded in float32 and in bfloat16.
    """
    found: list[str] = []
    for block in blocks:
        tensor = block.tensor.detach()
        if type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.is_floating_point():
            return None
        total = squares = 0
        for chunk in tensor.reshape(-1).split(CHUNK):
            bits = chunk.to(torch.bfloat16).view(torch.int16).to(torch.int64)
            total += int(bits.sum())
            squares += int((bits * bits).sum())
        found.append(f"{list(tensor.shape)} {(total, squares)}")
    return hashlib.blake2b("\n".join(sorted(found)).encode(), digest_size=16).hexdigest()


def format_names(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
