"""What fits on a device, and by which means: ``l2l estimate --devices``.

Zeroth-order means are predicted as a run is (:mod:`l2l.costs`). Those with a backward pass, which are other programs, are
arithmetic: 16 bytes per trained coordinate for AdamW in mixed precision (weight and gradient in 2 bytes, float32 master and two
moments in 4 each), 2 bytes per frozen one, or 4.127 bits where a layer's matrices are NF4 with double quantisation (Dettmers et
al. 2023, arXiv:2305.14314). Activations are recomputed, layer by layer: the hidden states before each layer are kept, and what
one layer computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from l2l import costs
from l2l.costs import Load, ModelShape, Plan
from l2l.models.prefix import NoPrefixError, chosen_layers, layer_list, trace_layers
from l2l.models.schemes import apply_scheme
from l2l.params import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEVICES = (8, 16, 24, 48, 80, 141)
"""Memory of common accelerators, in units of 10^9 bytes."""
SHARE = 0.9
"""Of a device's memory, at most so much is planned with: the driver and what the allocator cannot use take the rest."""
ADAMW_BYTES = 16
"""Per trained coordinate: weight 2, gradient 2, float32 master 4, two moments 4 each."""
NF4_BITS = 4.127
"""Per coordinate: 4, and the scale of 64 coordinates in 8 bits, whose own scale of 256 is float32 (arXiv:2305.14314)."""
TOP = "top:1/4"
"""Layers that are trained where the others stay in files."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model as each means holds it."""

    whole: ModelShape
    offloaded: ModelShape
    top: ModelShape | None
    """Only :data:`TOP` is trained, and the layers below are absent; None: they cannot be told apart."""
    adapted: ModelShape
    """With LoRA adapters of peft's defaults, which alone are trained."""
    packed: int
    """Coordinates of the frozen matrices of its layers."""
    largest: int
    """Coordinates of the largest of them."""

    @staticmethod
    def of(config: "PreTrainedConfig") -> "Sizes":
        """Of the model of a config, of which no weights are made."""
        model = costs.meta_model(config, torch.bfloat16)
        whole = costs.model_shape(model)
        offloaded, top = costs.offloaded(whole, model), _top(model)
        adapted = apply_scheme(costs.meta_model(config, torch.bfloat16), "lora", {}, 0)
        shape = costs.model_shape(adapted, Blocks.of(adapted))
        inside = [p for layer in layer_list(adapted) or () for p in layer.parameters()]
        matrices = [p.numel() for p in inside if p.ndim == 2 and not p.requires_grad]
        return Sizes(whole, offloaded, top, shape, sum(matrices), max(matrices, default=0))

    @property
    def quantised(self) -> int:
        """Bytes of the frozen weights of the model with adapters, of which the matrices of layers are NF4."""
        return round(self.packed * NF4_BITS / 8) + 2 * (self.adapted.parameters - self.adapted.trained - self.packed)


def _top(model: Any) -> ModelShape | None:
    try:
        trace = trace_layers(model)
    except NoPrefixError:
        return None
    chosen = chosen_layers(TOP, len(trace.layers))
    below, kept = trace.layers[: chosen[0]], {*chosen, len(trace.layers)}
    trained = Blocks(block for block in Blocks.of(model) if trace.places.get(id(block.tensor)) in kept)
    absent = sum(p.numel() for layer in below for p in layer.parameters())
    return replace(costs.model_shape(model, trained, below), absent=absent)


WIDE = Plan(torch.float32, "in_place", "direct")
HALF = Plan(torch.bfloat16, "functional", "stochastic")
ADAPTED = Plan(torch.bfloat16, "in_place", "direct")
"""Float32 adapters are moved where they lie."""


def _step(shape: ModelShape, load: Load, plan: Plan) -> int:
    return sum(costs.memory_parts(shape, load, plan).values())


def _backward(shape: ModelShape, load: Load) -> int:
    """Bytes of a batch and of activations that are recomputed."""
    kept = shape.layers * load.tokens * shape.width * 2
    return kept + costs.backward_bytes(replace(shape, layers=1), load, torch.bfloat16) + 16 * load.tokens


def _packed_step(sizes: Sizes, load: Load) -> int:
    """Bytes of a zeroth-order step of adapters beside NF4 matrices, each of which is widened for its product."""
    activations = costs.activation_bytes(sizes.adapted, load, torch.bfloat16) + 16 * load.tokens
    return sizes.quantised + costs.LOSS_BYTES * sizes.adapted.trained + 2 * sizes.largest + activations


def _frozen(shape: ModelShape) -> int:
    return 2 * (shape.parameters - shape.trained)


MEANS: dict[str, Callable[[Sizes, Load], int | None]] = {
    "AdamW full": lambda sizes, load: ADAMW_BYTES * sizes.whole.parameters + _backward(sizes.whole, load),
    "AdamW LoRA": lambda sizes, load: (
        _frozen(sizes.adapted) + ADAMW_BYTES * sizes.adapted.trained + _backward(sizes.adapted, load)
    ),
    "AdamW QLoRA": lambda sizes, load: sizes.quantised + ADAMW_BYTES * sizes.adapted.trained + _backward(sizes.adapted, load),
    "ZO full, float32": lambda sizes, load: _step(sizes.whole, load, WIDE),
    "ZO full": lambda sizes, load: _step(sizes.whole, load, HALF),
    f"ZO {TOP}, cached": lambda sizes, load: sizes.top and _step(sizes.top, load, HALF),
    "ZO LoRA": lambda sizes, load: _step(sizes.adapted, load, ADAPTED),
    "ZO LoRA, 4 bit": _packed_step,
    "ZO full, offload": lambda sizes, load: _step(sizes.offloaded, load, HALF),
}
"""Means of fine-tuning -> bytes on the device; None: the model's structure does not allow it. Those with gradients first; of
each kind, those that train more, and whose weights lie where they compute, before the others."""

OPTIONS = {
    "ZO full, float32": "",
    "ZO full": "--dtype bf16 --update stochastic",
    f"ZO {TOP}, cached": f"--dtype bf16 --update stochastic --train_layers {TOP} --stream_layers --prefix_cache disk",
    "ZO LoRA": "--dtype bf16 --scheme lora",
    "ZO LoRA, 4 bit": "--dtype bf16 --scheme lora --quantize bnb4",
    "ZO full, offload": "--dtype bf16 --update stochastic --offload",
}
"""Zeroth-order means -> options of ``l2l fine-tune``, beside ``--model``, ``--task`` and ``--device``."""


def needs_of(config: "PreTrainedConfig", load: Load) -> dict[str, int]:
    """Bytes on the device that a step takes at its peak, by each of :data:`MEANS` that the model allows."""
    sizes = Sizes.of(config)
    found = {means: need(sizes, load) for means, need in MEANS.items()}
    return {means: need for means, need in found.items() if need is not None}


def fits(need: int, memory: int) -> bool:
    """Whether so many bytes fit on a device of so many 10^9 bytes."""
    return need <= SHARE * memory * 10**9


def rows_of(needs: Mapping[str, int]) -> list[dict[str, str]]:
    """A row of a table for each means: what it takes, in 10^9 bytes, on which devices it fits, and options that choose it."""
    return [
        {"means": means, "needs": f"{need / 1e9:.2f} GB"}
        | {f"{memory} GB": "yes" if fits(need, memory) else "-" for memory in DEVICES}
        | {"l2l fine-tune": OPTIONS.get(means, "")}
        for means, need in needs.items()
    ]


def choices(needs: Mapping[str, int]) -> dict[str, tuple[str, str]]:
    """For each device the first means with gradients that fits, and the first with forward passes alone; ``-``: none."""

    def first(memory: int, zeroth: bool) -> str:
        fitting = (means for means, need in needs.items() if fits(need, memory) and means.startswith("ZO") == zeroth)
        return next(fitting, "-")

    return {f"{memory} GB": (first(memory, False), first(memory, True)) for memory in DEVICES}
