"""Greedy answers of one line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2l.models.heads import uncompiled
from l2l.tasks.encode import Ids, padding_id, special_prefix, tokenize

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_length: int,
    max_new_tokens: int = 50,
    batch_size: int = 32,
) -> list[str]:
    """Continue each prompt greedily until the first newline, the end-of-text token, or ``max_new_tokens``.

    A prompt keeps its last ``max_length - max_new_tokens`` tokens (and its leading BOS), so that prompt and answer
    fit into ``max_length``. Returns the continuations, in order, without the newline and outer white space.

    Raises:
        ValueError: ``max_length`` leaves no room for a prompt, or the model cannot generate.
    """
    continue_text = getattr(model, "generate", None)
    if continue_text is None:
        raise ValueError(f"{type(model).__name__} cannot generate text; use a causal language model")
    prefix = special_prefix(tokenizer)
    room = max_length - max_new_tokens - len(prefix)
    if room < 1:
        raise ValueError(
            f"max_length {max_length} leaves no room for a prompt beside {max_new_tokens} new tokens; raise max_length"
        )
    inputs = [prefix + ids[-room:] for ids in tokenize(tokenizer, list(prompts))]
    continue_greedily = partial(continue_text, generation_config=_greedy(tokenizer, max_new_tokens))
    # Prompts of like length go together, which saves padding.
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    texts = [""] * len(inputs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids, mask = _pad_left([inputs[index] for index in chosen], padding_id(tokenizer), model.device)
        with uncompiled(model):  # its key-value cache grows with every token
            output = continue_greedily(input_ids=input_ids, attention_mask=mask)
        batch = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, batch, strict=True):
            texts[index] = text.split("\n")[0].strip()
    return texts


def _greedy(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """A fresh config, because a model's own may ask for sampling, penalties or beams."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=_stop_ids(tokenizer),
        pad_token_id=padding_id(tokenizer),
    )


def _pad_left(inputs: list[Ids], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], padded on the left, where generation needs it."""
    columns = max(map(len, inputs))
    ids = [(pad_id,) * (columns - len(row)) + row for row in inputs]
    mask = [(0,) * (columns - len(row)) + (1,) * len(row) for row in inputs]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End of text, and every token whose text contains a newline."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    stops = {index for index, text in enumerate(texts) if "\n" in text}
    end = tokenizer.eos_token_id
    return sorted(stops | {end}) if isinstance(end, int) else sorted(stops)
