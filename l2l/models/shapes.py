"""Named model shapes: architectures without weights, for benchmarks and estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OPT: dict[str, Any] = {"vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True}


def _opt(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "opt", **_OPT, **sizes, "ffn_dim": 4 * width, "word_embed_proj_dim": width, **others}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "opt-tiny-shape": _opt(64, 2, 4, vocab_size=512, max_position_embeddings=128),
    "opt-125m-shape": _opt(768, 12, 12),
    "opt-1.3b-shape": _opt(2048, 24, 32),
    "opt-2.7b-shape": _opt(2560, 32, 32),
    "opt-13b-shape": _opt(5120, 40, 40),
    "opt-30b-shape": _opt(7168, 48, 56),
}
"""Name -> fields of the transformers config: the sizes of Zhang et al. 2022, arXiv:2205.01068, and one for tests."""


def shape_config(name: str) -> PreTrainedConfig:
    """The transformers config of a named shape.

    Raises:
        ValueError: no such shape.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; use one of {', '.join(SHAPES)}")
    fields = dict(SHAPES[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
