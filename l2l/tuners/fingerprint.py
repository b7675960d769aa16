"""Which model a tuner belongs to: names, shapes and kinds of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from l2l.blocks import Block, Blocks
from l2l.tuners.constants import KINDS, kind_of


@dataclass(frozen=True)
class Fingerprint:
    """Names and shapes of all blocks of the model that a tuner was made for, frozen ones included."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...] = field(default=(), compare=False)
    """What :func:`kind_of` says of each block; empty where the tuner was saved without."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or len(self.kinds) not in (0, len(self.names)):
            raise ValueError(f"the tuner's blocks have kinds that l2l does not know ({unknown[:1]}): get it again")
        sizes = [size for shape in self.shapes for size in shape]
        if len(set(self.names)) < len(self.names) or any(not isinstance(size, int) or size < 0 for size in sizes):
            raise ValueError("the tuner's blocks have names twice, or sizes that are no whole numbers: get it again")

    @staticmethod
    def of(model: nn.Module) -> Fingerprint:
        """Fingerprint of a model."""
        blocks = Blocks.of(model, trainable=False)
        shapes = tuple(tuple(block.tensor.shape) for block in blocks)
        return Fingerprint(blocks.names, shapes, tuple(kind_of(block) for block in blocks))

    def blocks(self) -> Blocks:
        """Blocks of these names, shapes and kinds, without memory."""
        kinds = self.kinds or ("",) * len(self.names)
        return Blocks(
            Block(name, torch.empty(shape, device="meta"), kind.endswith("embedding"), kind.startswith("attention"))
            for name, shape, kind in zip(self.names, self.shapes, kinds, strict=True)
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """What ``other`` lacks, has beside, or has in another shape; empty if they match. Order does not matter."""
        mine = dict(zip(self.names, self.shapes, strict=True))
        theirs = dict(zip(other.names, other.shapes, strict=True))
        missing = [name for name in mine if name not in theirs]
        extra = [name for name in theirs if name not in mine]
        other_shape = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        labels = ("missing in the model", missing), ("not in the tuner", extra), ("of another shape", other_shape)
        return [f"{len(names)} {label}: {some(names)}" for label, names in labels if names]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
