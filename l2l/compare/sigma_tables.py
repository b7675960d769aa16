"""Sigma per block without learning: from gradients, or by boosting one block. Tables for the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2l.blocks import Block, Blocks
from l2l.estimators.backward import consume_gradients
from l2l.estimators.base import Closure
from l2l.finetune.batches import Feeder
from l2l.tasks.losses import batch_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 0.1
"""Sigma of a block whose gradients do not agree over batches, beside a root mean square of 1: small, not frozen."""
BOOST = 4.0
"""Sigma of the boosted block, beside 1."""


def gradient_agreement(closures: Sequence[Closure], blocks: Blocks) -> Tensor:
    """G_b [blocks] float64, an unbiased estimate of the squared norm of the full gradient per block.

    The mean of <g_i, g_j> over all pairs of different batches: (|sum g|^2 - sum |g|^2) / (n (n - 1)). One gradient is
    kept in memory. An estimate may be negative.

    Raises:
        ValueError: fewer than two batches.
    """
    count = len(closures)
    if count < 2:
        raise ValueError(f"{count} batches: agreement is between two at least")
    sums: dict[int, Tensor] = {}
    squares = torch.zeros(len(blocks), dtype=torch.float64)

    def take(index: int, gradient: Tensor) -> None:
        squares[index] += gradient.double().square().sum().item()
        sums[index] = gradient.double() + sums.get(index, 0.0)

    for closure in closures:
        consume_gradients(closure, blocks, take)
    whole = torch.tensor([float(sums[i].square().sum()) if i in sums else 0.0 for i in range(len(blocks))])
    return (whole.double() - squares) / (count * (count - 1))


def task_agreement(model: PreTrainedModel, feeder: Feeder, batches: int) -> Tensor:
    """:func:`gradient_agreement` [blocks] of a model on the first batches of a task, at its weights as they stand."""

    def loss(number: int) -> Tensor:
        return batch_loss(model, feeder.at(number), feeder.form)

    return gradient_agreement([partial(loss, number) for number in range(batches)], Blocks.of(model))


def sigma_from(agreements: Sequence[Tensor], blocks: Blocks) -> Tensor:
    """Sigma [blocks] float32 with sigma^2 proportional to G_b / d_b, mean square 1 over all coordinates.

    Each task's G is divided by its sum first, so that tasks weigh alike; negative ones count as 0, and no sigma is below
    :data:`LEAST`.

    Raises:
        ValueError: on no task do the gradients of any block agree.
    """
    shares = [found.clamp(min=0) / found.clamp(min=0).sum() for found in agreements if (found > 0).any()]
    if not shares:
        raise ValueError("the gradients of different batches agree in no block: take more batches (control_batches)")
    sizes = torch.tensor([block.numel for block in blocks], dtype=torch.float64)
    square = torch.stack(shares).mean(0) / sizes
    return (square * sizes.sum() / (square * sizes).sum()).sqrt().clamp(min=LEAST).float()


def boosted(model: nn.Module, look: Callable[[], Any]) -> tuple[Tensor, str]:
    """Sigma [blocks] of 1, but :data:`BOOST` for the block that puts the largest vector into the model's main stream.

    Candidates are matrices whose modules narrow: more inputs than outputs, as the output projection of an MLP does, and
    not the embedding or the head. Of these the one whose output has the largest norm at any one token of a batch: in
    many language models the second or third of its kind, known for massive activations.

    Args:
        look: runs the model on a batch.

    Raises:
        ValueError: no module narrows.
    """
    blocks = Blocks.of(model)
    largest: dict[str, float] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and inputs[0].shape[-1] > output.shape[-1]:
            norm = float(output.detach().float().norm(dim=-1).max())
            largest[name] = max(norm, largest.get(name, 0.0))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in _matrices(model, blocks)]
    try:
        with torch.no_grad():
            look()
    finally:
        for handle in handles:
            handle.remove()
    if not largest:
        raise ValueError("no matrix of the model narrows its input: there is no block to boost")
    chosen = max(largest, key=lambda name: largest[name])
    return torch.tensor([BOOST if name == chosen else 1.0 for name in blocks.names]), chosen


def _matrices(model: nn.Module, blocks: Blocks) -> list[tuple[str, nn.Module]]:
    """Modules that own a matrix among the blocks as their weight, by the block's name."""
    named: dict[int, Block] = {id(block.tensor): block for block in blocks if block.tensor.ndim == 2}
    owners = [(named.get(id(getattr(module, "weight", None))), module) for module in model.modules()]
    return [(block.name, module) for block, module in owners if block is not None and not block.embedding]
