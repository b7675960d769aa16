"""Predicted peak memory, part by part, in bytes. Pure functions of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from l2l.costs.model_shape import ModelShape
from l2l.params.blocks import Blocks

PerturbMode = Literal["in_place", "functional"]
Update = Literal["direct", "master", "stochastic"]

LOSS_BYTES = 4
"""Losses are float32."""
_BATCH_BYTES = 16
"""Per token fed: its id and its mask, int64."""


@dataclass(frozen=True)
class Load:
    """Input of one forward pass, all its calls together."""

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
    """How a model is fine-tuned: choices of the run, and the declared costs of the method."""

    dtype: torch.dtype
    perturb: PerturbMode
    update: Update
    passes: float = 2.0
    """Forward passes per step, without those of ``lr="auto"``."""
    num_directions: int = 1
    """Directions per step; 0: a first-order method, which perturbs nothing."""
    state: int = 0
    """Bytes that the method keeps between steps."""
    scratch: int = 0
    """Bytes that a step holds for the method."""
    differentiates: bool = False
    """Whether derivatives are taken: activations of all layers are then held, an upper bound where only the last layers
    are differentiated, or in forward mode."""
    learned: bool = False
    """Whether a tuner reads the moments of the weights at each step."""

    @staticmethod
    def of(dtype: torch.dtype, perturb: PerturbMode, update: Update, method: Any, blocks: Blocks) -> Plan:
        """The plan of a method object for these blocks."""
        return Plan(
            dtype,
            perturb,
            update,
            passes=method.passes,
            num_directions=getattr(method, "num_directions", 0),
            state=method.state_bytes(blocks),
            scratch=method.scratch_bytes(blocks),
            differentiates=method.differentiates,
            learned=_has_tuner(method),
        )


def _has_tuner(method: Any) -> bool:
    return hasattr(method, "tuner") or (hasattr(method, "inner") and _has_tuner(method.inner))


def choose_perturb_mode(dtype: torch.dtype, perturb: str) -> PerturbMode:
    """How weights are perturbed; ``auto`` is in place where restoring them costs one rounding.

    Raises:
        ValueError: half precision cannot be perturbed in place.
    """
    whole = dtype in (torch.float32, torch.float64)
    if perturb == "in_place" and not whole:
        raise ValueError(
            f"perturb='in_place' needs float32 weights, these are {dtype}: use perturb='functional' or dtype float32"
        )
    return "functional" if perturb == "functional" or not whole else "in_place"


def choose_update(dtype: torch.dtype, update: str, room: int, master: int) -> Update:
    """How an update reaches the weights: float32 takes it directly.

    Args:
        update: ``master``, ``stochastic``, or ``auto``: the master where it takes at most half of the room, else
            stochastic rounding for bfloat16.
        room: bytes left once the weights are loaded.
        master: bytes of a float32 copy of the trained weights.

    Raises:
        ValueError: float16 is to be rounded stochastically.
    """
    if dtype in (torch.float32, torch.float64):
        return "direct"
    if update == "stochastic" and dtype == torch.float16:
        raise ValueError("update='stochastic' rounds to bfloat16: use update='master' or dtype bf16")
    scarce = update == "auto" and 2 * master > room and dtype == torch.bfloat16
    return "stochastic" if update == "stochastic" or scarce else "master"


def activation_bytes(shape: ModelShape, load: Load, dtype: torch.dtype) -> int:
    """Most that a forward pass without gradients holds at once: in an MLP, in attention, or at the logits.

    An MLP holds the residual stream, its input, the expanded states and their activation. Attention holds the residual
    stream, its input, queries, keys and values, the scaled queries, and the output; eager attention the scores and
    their float32 softmax as well. The loss holds the last hidden states, the logits, and their float32 logarithms.
    """
    return load.tokens * load.length * dtype.itemsize + max(_held(shape, load, dtype))


def backward_bytes(shape: ModelShape, load: Load, dtype: torch.dtype) -> int:
    """Most that a forward and backward pass hold at once: the activations of every layer, and the logits with their
    gradient. An upper bound: what autograd frees in time is not told apart.
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
    cast = 0 if dtype == torch.float32 else LOSS_BYTES
    loss = 2 * load.tokens * d * size + load.read * shape.vocabulary * (size + cast + LOSS_BYTES)
    return mlp, attention, loss


_TRANSIENT = ("activations", "batch", "perturb", "scratch")
"""Parts that come and go within a step."""


def memory_parts(shape: ModelShape, load: Load, plan: Plan) -> dict[str, int]:
    """Bytes of each part at the peak of a step: ``perturb`` are the copies of perturbed blocks, ``master`` the float32 copy
    of the trained weights, ``method`` and ``scratch`` what the method holds between steps and within one."""
    size = plan.dtype.itemsize
    copied = plan.num_directions and plan.perturb == "functional"
    return {
        "weights": shape.parameters * size,
        "activations": (backward_bytes if plan.differentiates else activation_bytes)(shape, load, plan.dtype),
        "batch": load.tokens * _BATCH_BYTES,
        "perturb": sum(sorted(shape.whole)[-2:]) * size if copied else 0,  # at most two blocks are copied at a time
        "master": shape.trained * LOSS_BYTES if plan.update == "master" else 0,
        "method": plan.state,
        "scratch": plan.scratch,
    }


def transient_bytes(parts: dict[str, int]) -> int:
    """What steps add to a model that is loaded and a method that is set up."""
    return sum(parts[name] for name in _TRANSIENT)


def inference_bytes(parts: dict[str, int]) -> int:
    """What a forward pass alone would need."""
    return parts["weights"] + parts["activations"] + parts["batch"]
