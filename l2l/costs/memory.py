"""Predicted peak memory, part by part, in bytes. Pure functions of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from l2l.costs.model_shape import ModelShape

PerturbMode = Literal["in_place", "functional"]
Update = Literal["direct", "master", "stochastic"]

LOSS_BYTES = 4
"""Losses are float32."""
_BATCH_BYTES = 16
"""Per token fed: its id and its mask, int64."""


@dataclass(frozen=True)
class Load:
    """What one forward pass is fed, all its calls together."""

    rows: int
    length: int
    read: int
    """Tokens, of all rows together, whose logits are computed."""
    calls: int = 1
    """Calls of the model that the rows are split into by length."""

    @property
    def tokens(self) -> int:
        """Tokens fed, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Plan:
    """How a model is fine-tuned."""

    dtype: torch.dtype
    perturb: PerturbMode
    update: Update
    anchor: int = 0
    """Coordinates of which the method holds a copy throughout."""
    search: int = 0
    """Coordinates copied while the method searches."""
    scratch: int = 0
    """Bytes the method needs for a moment, between forward passes."""
    tuner: int = 0
    """Parameters of the tuner."""
    backward: bool = False
    """Whether a step goes back through the model: all gradients, and activations of all layers, are held at once."""
    states: int = 0
    """Float32 coordinates that a first-order method keeps from step to step."""


def choose_perturb_mode(dtype: torch.dtype, perturb: str) -> PerturbMode:
    """The way of walking; ``auto`` is in place where coming back costs one rounding.

    Raises:
        ValueError: half precision cannot be walked in place.
    """
    whole = dtype in (torch.float32, torch.float64)
    if perturb == "in_place" and not whole:
        raise ValueError(
            f"perturb='in_place' needs float32 weights, these are {dtype}: use perturb='functional' or dtype float32"
        )
    return "functional" if perturb == "functional" or not whole else "in_place"


def activation_bytes(shape: ModelShape, load: Load, dtype: torch.dtype) -> int:
    """Most that a forward pass without gradients holds at once: in an MLP, in attention, or at the logits.

    An MLP holds the residual stream, its input, the expanded states and their activation. Attention holds the residual
    stream, its input, queries, keys and values, the scaled queries, and the output; eager attention the scores and
    their float32 softmax as well. The loss holds the last hidden states, the logits, and their float32 logarithms.
    """
    return load.tokens * load.length * dtype.itemsize + max(_held(shape, load, dtype))


def backward_bytes(shape: ModelShape, load: Load, dtype: torch.dtype) -> int:
    """Most that a forward and backward pass hold at once: what each layer has computed, and the logits twice over.

    Of the logits the gradient is as large as they are. What autograd frees in time is not told apart, so this is more
    than is needed.
    """
    mlp, attention, loss = _held(shape, load, dtype)
    return load.tokens * load.length * dtype.itemsize + shape.layers * (mlp + attention) + 2 * loss


def _held(shape: ModelShape, load: Load, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of the tensors that one MLP, one layer's attention and the loss compute."""
    size, d = dtype.itemsize, shape.width
    mlp = load.tokens * (2 * d + (shape.gates + 1) * shape.expanded) * size
    attention = load.tokens * 7 * d * size
    if shape.eager_attention:
        attention += load.tokens * load.length * shape.heads * (size + LOSS_BYTES)
    casted = 0 if dtype == torch.float32 else LOSS_BYTES
    loss = 2 * load.tokens * d * size + load.read * shape.vocabulary * (size + casted + LOSS_BYTES)
    return mlp, attention, loss


def memory_parts(shape: ModelShape, load: Load, plan: Plan) -> dict[str, int]:
    """Bytes of each part at the peak of a step. Activations, batch, walk, search and gradients come and go."""
    size = plan.dtype.itemsize
    activations = (backward_bytes if plan.backward else activation_bytes)(shape, load, plan.dtype)
    parts = {
        "weights": shape.parameters * size,
        "activations": max(activations, plan.scratch),
        "batch": load.tokens * _BATCH_BYTES,
        "walk": 0 if plan.backward else perturb_bytes(shape, plan),
        "master": master_bytes(shape, plan),
        "method": plan.anchor * size + (plan.tuner + plan.states) * LOSS_BYTES,
        "search": plan.search * size,
    }
    return parts | ({"gradients": shape.trained * size} if plan.backward else {})


def choose_update(dtype: torch.dtype, update: str, room: int, master: int) -> Update:
    """How an update reaches the weights: float32 takes it directly.

    Args:
        update: ``master``, ``stochastic``, or ``auto``: the master where it takes at most half of the room, else
            stochastic rounding for bfloat16.
        room: bytes left once the weights are loaded.
        master: bytes of a float32 copy of what is trained.

    Raises:
        ValueError: float16 is to be rounded stochastically.
    """
    if dtype in (torch.float32, torch.float64):
        return "direct"
    if update == "stochastic" and dtype == torch.float16:
        raise ValueError("update='stochastic' rounds to bfloat16: use update='master' or dtype bf16")
    scarce = update == "auto" and 2 * master > room and dtype == torch.bfloat16
    return "stochastic" if update == "stochastic" or scarce else "master"


def passing_bytes(parts: dict[str, int]) -> int:
    """What comes on top when a model is loaded and its method set up."""
    return sum(parts.get(name, 0) for name in ("activations", "batch", "walk", "search", "gradients"))


def perturb_bytes(shape: ModelShape, plan: Plan) -> int:
    """Transient copies: none in place, else of the two largest blocks that are read whole."""
    return 0 if plan.perturb == "in_place" else sum(sorted(shape.whole)[-2:]) * plan.dtype.itemsize


def master_bytes(shape: ModelShape, plan: Plan) -> int:
    """The float32 copy of what is trained, where one is kept."""
    return shape.trained * LOSS_BYTES if plan.update == "master" else 0


def inference_bytes(parts: dict[str, int]) -> int:
    """What a mere forward pass would need."""
    return parts["weights"] + parts["activations"] + parts["batch"]
