"""Models to measure on: named shapes with random weights, built where they will run, or real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from l2l.blocks import Block, Blocks
from l2l.models.load import DTYPES, context_length, load_model
from l2l.models.shapes import SHAPES, shape_config
from l2l.noise import Key, TensorSlice, NoiseTerm, standard_deviation, add_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 0.02
"""Standard deviation of random matrices."""


def build(name: str, dtype: str, device: torch.device, seed: int = 0, length: int | None = None) -> PreTrainedModel:
    """The model of a name in eval mode. A shape gets the same random weights on every device.

    Args:
        name: a shape of :mod:`l2l.models.shapes`, or what :func:`l2l.models.load.load_model` takes.
        length: tokens per row that it must take.

    Raises:
        ValueError, FileNotFoundError: no such shape or model, or too few positions; before weights are made.
    """
    if name not in SHAPES and not name.endswith("-shape"):
        model = load_model(name, dtype, device)
        context_length(model, length)
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape_config(name), dtype=DTYPES[dtype])
    context_length(empty, length)
    model = empty.to_empty(device=device)
    model.tie_weights()
    fill(model, seed)
    return model.eval()


def fill(model: nn.Module, seed: int) -> None:
    """Matrices become keyed noise, norms one, biases zero: fast, and alike on every device."""
    ones = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    blocks = list(Blocks.of(model, trainable=False))
    for block in blocks:
        block.flat.fill_(1.0 if id(block.tensor) in ones else 0.0)
    matrices: list[Block] = [block for block in blocks if block.tensor.ndim > 1]
    scale = SPREAD / standard_deviation("gaussian")
    pieces = [TensorSlice(block.flat, block.name) for block in matrices]
    add_noise(pieces, [NoiseTerm(Key(seed), [(scale,)] * len(pieces))])
