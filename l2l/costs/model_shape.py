"""Sizes of a model that decide memory and time, read off its modules; they may hold no data (meta device)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2l.models.kinds import auto_class, kind_of_config
from l2l.models.load import EMBEDDED
from l2l.models.shapes import SHAPES, shape_config
from l2l.params.blocks import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model. Tied tensors count once."""

    parameters: int
    """All parameters."""
    blocks: tuple[int, ...]
    """Coordinates of each block that is trained."""
    whole: tuple[int, ...]
    """Coordinates of the trained blocks that a forward pass reads whole; of an embedding that is not the head too, only
    rows are looked up."""
    matrices: int
    """Coordinates of the matrices every token is multiplied with: neither embeddings nor the head."""
    layers: int
    heads: int
    width: int
    """Of the hidden states."""
    expanded: int
    """Widest hidden layer of the MLPs."""
    gates: int
    """Projections of that width per layer: 1, or 2 where one gates the other."""
    vocabulary: int
    modules: int
    """Modules without children: each costs a call."""
    eager_attention: bool = False
    """Whether attention scores are materialised."""

    @property
    def trained(self) -> int:
        """Coordinates of all blocks together."""
        return sum(self.blocks)

    @property
    def head(self) -> int:
        """Coordinates of the matrix that gives the logits."""
        return self.vocabulary * self.width


def config_of(model: str, revision: str | None = None) -> PreTrainedConfig:
    """The transformers config of a named shape, ``l2l/tiny``, a directory or a hub id. No weights are read.

    Raises:
        ValueError: no such shape, or the config cannot be read.
        FileNotFoundError: no such directory, or the model is neither in the local cache nor can it be fetched.
    """
    if model in SHAPES or (model.endswith("-shape") and not Path(model).is_dir()):
        return shape_config(model)
    from transformers import AutoConfig

    from l2l.models import load

    source = str(Path(load.__file__).parent / "tiny") if model == EMBEDDED else model
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"directory {model!r} has no config.json; give a directory saved by save_pretrained")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no config of {model!r} in a directory of that name, in the cache or on the hub: {line}; "
            f"or name a shape: {', '.join(SHAPES)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"cannot read the config of {model!r}: {str(error).strip().splitlines()[0]}") from error


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a config with modules and shapes, and no data."""
    with torch.device("meta"):
        return auto_class(kind_of_config(config)).from_config(config, dtype=dtype, trust_remote_code=False)


def model_shape(model: PreTrainedModel, trained: Blocks | None = None) -> ModelShape:
    """Sizes of a model; ``trained`` are its trained blocks, by default all."""
    every = Blocks.of(model, trainable=False)
    text: Any = model.config.get_text_config()
    trained = every if trained is None else trained
    output = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    head = getattr(output, "weight", None)
    matrices = [b.tensor for b in every if b.tensor.ndim >= 2 and not b.embedding and b.tensor is not head]
    width = int(text.hidden_size)
    flat = [tuple(m.shape) for m in matrices if m.ndim == 2]
    expanded = max((max(shape) for shape in flat), default=width)
    layers = int(text.num_hidden_layers)
    wide = sum(expanded in shape for shape in flat)
    return ModelShape(
        parameters=every.numel,
        blocks=tuple(block.numel for block in trained),
        whole=tuple(block.numel for block in trained if not block.embedding or block.tensor is head),
        matrices=sum(matrix.numel() for matrix in matrices),
        layers=layers,
        heads=int(getattr(text, "num_attention_heads", 1) or 1),
        width=width,
        expanded=expanded,
        gates=max(1, round(wide / max(layers, 1)) - 1),  # of its matrices one leads back
        vocabulary=int(text.vocab_size),
        modules=sum(1 for module in model.modules() if not any(True for _ in module.children())),
        eager_attention=getattr(model.config, "_attn_implementation", None) == "eager",
    )
