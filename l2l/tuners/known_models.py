"""The models of published tuners in numbers, so that their blocks are known without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from l2l.tuners.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _sizes(width: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.2-1B": {"model_type": "llama", **_sizes(2048, 8192, 16, 32, 8, 128256, True)},
    "meta-llama/Llama-3.1-8B": {"model_type": "llama", **_sizes(4096, 14336, 32, 32, 8, 128256, False)},
    "facebook/opt-30b": {
        "model_type": "opt",
        "hidden_size": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "word_embed_proj_dim": 7168,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    },
    "Qwen/Qwen2.5-14B": {"model_type": "qwen2", **_sizes(5120, 13824, 48, 40, 8, 152064, False)},
}
"""Hub id -> the fields of its transformers config that decide names and shapes of blocks; the others are defaults."""


def known_config(base_model: str) -> PreTrainedConfig:
    """The transformers config of a model of :data:`KNOWN_MODELS`, case aside.

    Raises:
        ValueError: it is none of them.
    """
    from transformers import AutoConfig

    fields = {name.lower(): dict(found) for name, found in KNOWN_MODELS.items()}.get(base_model.lower())
    if fields is None:
        raise ValueError(
            f"the blocks of {base_model!r} are not known here: {', '.join(KNOWN_MODELS)} are. Of another model, name a "
            "directory or hub id whose config tells them, as --model"
        )
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a config without memory: names, shapes and ties of its blocks, no numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def known_fingerprint(base_model: str) -> Fingerprint:
    """Blocks of a model of :data:`KNOWN_MODELS`.

    Raises:
        ValueError: it is none of them.
    """
    return Fingerprint.of(skeleton(known_config(base_model)))
