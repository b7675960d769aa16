"""What transient copies are held against: the same model with its stored weights perturbed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from l2l.noise import TensorSlice, add_noise
from l2l.params import Blocks, Direction
from l2l.params.engine import Perturbation


def language_loss(model: nn.Module) -> Any:
    ids = torch.randint(0, 128, (3, 11), generator=torch.Generator().manual_seed(5))
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def perturbed_in_place(model: nn.Module, u: Direction, distance: float) -> nn.Module:
    """A copy whose stored weights are what transient copies of the model's are to hold."""
    changed = copy.deepcopy(model)
    blocks = Blocks.of(changed)
    move = Perturbation(u, distance).move(len(blocks))
    add_noise([TensorSlice(block.flat, block.name) for block in blocks], [move.term(range(len(blocks)))])
    return changed
