"""Models without trained weights: named shapes for benchmarks and estimates, tiny random models for tests and dry runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2l.models.kinds import Head, auto_class, kind_of_config
from l2l.models.schemes import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OPT: dict[str, Any] = {"vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True}


def _opt(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "opt", **_OPT, **sizes, "ffn_dim": 4 * width, "word_embed_proj_dim": width, **others}


def _llama3(width: int, expanded: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": expanded, "num_hidden_layers": layers, "num_attention_heads": heads}
    others = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False}
    return {"model_type": "llama", **sizes, **others}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "opt-tiny-shape": _opt(64, 2, 4, vocab_size=512, max_position_embeddings=128),
    "opt-125m-shape": _opt(768, 12, 12),
    "opt-1.3b-shape": _opt(2048, 24, 32),
    "opt-2.7b-shape": _opt(2560, 32, 32),
    "opt-13b-shape": _opt(5120, 40, 40),
    "opt-30b-shape": _opt(7168, 48, 56),
    "smollm2-135m-shape": {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
    "llama3-8b-shape": _llama3(4096, 14336, 32, 32),
    "llama3-70b-shape": _llama3(8192, 28672, 80, 64),
}
"""Name -> fields of the transformers config: the sizes of Zhang et al. 2022, arXiv:2205.01068, one for tests, and those of
Allal et al. 2025, arXiv:2502.02737, and of the Llama team 2024, arXiv:2407.21783."""


def shape_config(name: str) -> "PreTrainedConfig":
    """The transformers config of a named shape; ValueError where there is none."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; use one of {', '.join(SHAPES)}")
    fields = dict(SHAPES[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


_NAMES: dict[int, str] = {
    2: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers num_experts_per_tok "
    "num_key_value_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_local_experts "
    "num_experts n_routed_experts rotary_dim",
    8: "head_dim d_kv",
    32: "hidden_size n_embd d_model word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size",
    64: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim",
    128: "vocab_size",
    256: "max_position_embeddings n_positions max_seq_len",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Size fields of configs, under all the names transformers gives them, and their tiny values."""

_DERIVED = ("layer_types", "architectures", "transformers_version", "model_type", "dtype", "torch_dtype")
"""Fields that are recomputed or say how a checkpoint was saved."""


def tiny_random(family: str, seed: int = 0, head: Head = "auto", **overrides: Any) -> "PreTrainedModel":
    """A random float32 model of a transformers model type, 2 layers and 32 wide, in eval mode.

    Args:
        family: ``model_type`` as transformers names it: ``llama``, ``opt``, ``gpt2``, ``roberta``, ``t5``, …
        seed: fixes the weights; torch's global generator is left untouched.
        head: the kind of model; ``auto``: what the model type is made for (see :mod:`l2l.models.kinds`).
        overrides: config fields to set instead of the defaults.

    Raises:
        ValueError: transformers knows no model of that type, or none of that kind.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(family)
    except ValueError as error:
        raise ValueError(f"unknown model type {family!r}; use a model_type of transformers, such as 'llama'") from error
    return like(config, seed, head, **overrides)


def like(
    config_or_id: "PreTrainedConfig | str | Path", seed: int = 0, head: Head = "auto", **overrides: Any
) -> "PreTrainedModel":
    """A tiny random model of the same architecture as a config, a directory or a hub id; see :func:`tiny_random`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(config_or_id) if isinstance(config_or_id, str | Path) else config_or_id
    fields = {name: value for name, value in config.to_dict().items() if name not in _DERIVED}
    # A field that is absent or unset stays so.
    fields |= {name: size for name, size in _SIZES.items() if isinstance(fields.get(name), int)}
    fields |= overrides
    vocabulary = fields.get("vocab_size", _SIZES["vocab_size"])
    # A special token past the end of the small vocabulary would break the embedding's padding row.
    ids = {name: value for name, value in fields.items() if name.endswith("_token_id") and isinstance(value, int)}
    # A decoder of its own starts with padding where the config does not say with what.
    start = {"decoder_start_token_id": ids.get("pad_token_id", 0)} if fields.get("is_encoder_decoder") else {}
    fields |= {name: min(value, vocabulary - 1) for name, value in (start | ids).items()}
    with seeded(seed):
        model = auto_class(kind_of_config(config, head)).from_config(type(config)(**fields), dtype=torch.float32)
    return model.eval()
