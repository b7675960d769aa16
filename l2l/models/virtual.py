"""Virtual tokens: what a model under prefix or prompt tuning is fed in place of plain rows.

Prompt tuning puts learned embeddings before a row, so that every column lies further right; prefix tuning puts learned
keys and values into the cache of every layer, and the columns stay where they are. Both take up positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l.models.trees import computing_dtype, tree_inputs


def virtual_tokens(model: object) -> int:
    """How many positions of every row an adapter takes up; 0 where the model has no prefix and no prompt."""
    config = _prompt_config(model)
    return 0 if config is None else config.num_virtual_tokens


def columns_before(model: object) -> int:
    """How many columns further right a row's hidden states lie: those of a prompt; a prefix has none."""
    return 0 if _in_cache(model) else virtual_tokens(model)


def virtual_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """What the base model is given, beside ``use_cache=False``, for rows with their virtual tokens.

    Args:
        model: a model of peft with a prefix or a prompt.
        input_ids: [R, T] right-padded rows.
        attention_mask: [R, T] 1 on tokens; or the sight [R, T, T] of rows that branch: every token sees the virtual ones.
    """
    inside = _in_cache(model)
    before = model.get_prompt(len(input_ids))
    seen = _seen(attention_mask, virtual_tokens(model), computing_dtype(model), inside)
    if inside:
        return {"input_ids": input_ids, "past_key_values": before, **seen}
    embedded = model.get_input_embeddings()(input_ids)
    return {"inputs_embeds": torch.cat([before.to(embedded.dtype), embedded], 1), **seen}


def _seen(attention_mask: Tensor, count: int, dtype: torch.dtype, inside: bool) -> dict[str, Tensor]:
    """The mask, and for rows that branch the positions, with the virtual tokens as further columns at the left."""
    rows, columns = attention_mask.shape[:2]
    if attention_mask.ndim == 2:
        return {"attention_mask": torch.cat([attention_mask.new_ones(rows, count), attention_mask], 1)}
    evaluator = torch.ones(rows, count + columns, count + columns, dtype=torch.bool, device=attention_mask.device).tril_()
    evaluator[:, count:, count:] = attention_mask
    found = tree_inputs(evaluator, dtype)
    if not inside:
        return found
    return {
        "attention_mask": found["attention_mask"][:, :, count:],
        "position_ids": found["position_ids"][:, count:],
    }


def _prompt_config(model: object) -> Any:
    """The configuration of the model's prefix or prompt; None where it has neither."""
    config = getattr(model, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def _in_cache(model: object) -> bool:
    """Whether the virtual tokens are keys and values: peft's configuration of a prefix is the one that may project them."""
    return hasattr(_prompt_config(model), "prefix_projection")
