"""What a block is, in numbers that stay as they are throughout a run. Read off shapes and structure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l2l.blocks import Block, Blocks

FLOOR = 1e-8
"""Added to variances: blocks that start constant, as biases and norms do, have a finite logarithm."""

CONSTANT_COLUMNS = ("log_start_variance", "embedding", "matrix", "vector", "attention", "depth", "log_size", "log_fan_in")
NUM_CONSTANTS = len(CONSTANT_COLUMNS)

KINDS = tuple(f"{prefix}{kind}" for prefix in ("", "attention ") for kind in ("embedding", "matrix", "vector"))
"""What :func:`kind_of` says."""


def kind_of(block: Block) -> str:
    """``embedding``, ``matrix`` (two dimensions or more) or ``vector``; ``attention`` before it where it belongs to one."""
    kind = "embedding" if block.embedding else "matrix" if block.tensor.ndim > 1 else "vector"
    return f"attention {kind}" if block.attention else kind


def block_constants(blocks: Blocks, moments: Tensor) -> Tensor:
    """[blocks, CONSTANTS] float32: log(variance + FLOOR) of the moments [blocks, 2], then what never changes.

    The kind as one-hot columns, 1 where the block belongs to attention, :func:`depths`, log10(size) / 6, and
    log10(fan-in) / 3, fan-in being the coordinates per row, or 1 for a vector.
    """
    found = torch.empty(len(blocks), NUM_CONSTANTS)
    found[:, 0] = torch.log(moments[:, 1] + FLOOR)
    rows = [_constants(block, depth) for block, depth in zip(blocks, depths(blocks.names), strict=True)]
    found[:, 1:] = torch.tensor(rows).reshape(len(blocks), NUM_CONSTANTS - 1)
    return found


def _constants(block: Block, depth: float) -> list[float]:
    kind = kind_of(block)
    one_hot = [float(kind.endswith(name)) for name in ("embedding", "matrix", "vector")]
    size, fan_in = max(block.numel, 1), 1
    if block.tensor.ndim > 1:
        fan_in = max(block.numel // max(block.tensor.shape[0], 1), 1)
    return [*one_hot, float(block.attention), depth, math.log10(size) / 6, math.log10(fan_in) / 3]


def depths(names: Sequence[str]) -> list[float]:
    """How deep each block lies, 0 to 1.

    By the first whole number among the dotted parts of its name, as lists of layers give it: layer i of k lies at
    (i + 1/2) / k; blocks without a number lie at 0 before the first numbered one and at 1 behind it. Where no name has a
    number, by position.
    """
    layers = [next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        return [i / max(len(names) - 1, 1) for i in range(len(names))]
    first, count = next(i for i, layer in enumerate(layers) if layer is not None), max(numbered) + 1
    return [float(i > first) if layer is None else (layer + 0.5) / count for i, layer in enumerate(layers)]
