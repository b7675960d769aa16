"""Greedy answers of one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from l2l.models.heads import generator, uncompiled
from l2l.models.load import kind_of, unwrapped
from l2l.models.prompt_trees import Ids
from l2l.tasks.encode import padding_id
from l2l.tasks.reader import decoder_start
from l2l.tasks.texts import special_ids, tokenize

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
    fit into ``max_length``. An encoder-decoder is fed the prompt as the tokenizer frames a text, and answers in rows of
    their own. Returns the answers, in order, without the newline and outer white space.

    Raises:
        ValueError: ``max_length`` leaves no room for a prompt, or the model cannot generate.
    """
    continue_text, kind = generator(model), kind_of(model)
    if continue_text is None or kind not in ("causal", "seq2seq"):
        raise ValueError(f"{type(model).__name__} cannot generate text; use a causal or seq2seq language model")
    before, after = special_ids(tokenizer)
    opening = (decoder_start(model), *before) if kind == "seq2seq" else ()
    room = max_length - len(before) - (len(after) if opening else max_new_tokens)
    if min(room, max_length - len(opening) - max_new_tokens) < 1:
        raise ValueError(
            f"max_length {max_length} leaves no room for a prompt beside {max_new_tokens} new tokens; raise max_length"
        )
    inputs = [before + ids[-room:] + (after if opening else ()) for ids in tokenize(tokenizer, list(prompts))]
    greedy = _greedy(tokenizer, max_new_tokens, opening[0] if opening else None)
    continue_greedily = partial(continue_text, generation_config=greedy)
    # Prompts of like length go together, which saves padding.
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    texts = [""] * len(inputs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # An encoder counts its positions from the left, a decoder goes on at the right.
        fed = _pad([inputs[index] for index in chosen], padding_id(tokenizer), model.device, left=not opening)
        if opening:
            fed["decoder_input_ids"] = torch.tensor([opening] * len(chosen), device=model.device)
        with _told_by(model, greedy), uncompiled(model):  # its key-value cache grows with every token
            output = continue_greedily(**fed)
        given = len(opening) or fed["input_ids"].shape[1]
        batch = tokenizer.batch_decode(output[:, given:], skip_special_tokens=True)
        for index, text in zip(chosen, batch, strict=True):
            texts[index] = text.split("\n")[0].strip()
    return texts


@contextmanager
def _told_by(model: object, config: GenerationConfig) -> Iterator[None]:
    """Put a config in the place of the model's own, by which transformers fills up what the config leaves open."""
    owner = unwrapped(model)
    own = getattr(owner, "generation_config", None)
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own


def _greedy(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, start: int | None) -> GenerationConfig:
    """A fresh config, because a model's own may ask for sampling, penalties or beams."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=_stop_ids(tokenizer),
        pad_token_id=padding_id(tokenizer),
        decoder_start_token_id=start,
    )


def _pad(inputs: list[Ids], pad_id: int, device: torch.device, left: bool) -> dict[str, Tensor]:
    """Ids and mask [B, T], padded on one side."""
    columns = max(map(len, inputs))

    def filled(row: Ids, value: int) -> Ids:
        empty = (value,) * (columns - len(row))
        return empty + row if left else row + empty

    ids = [filled(row, pad_id) for row in inputs]
    mask = [filled((1,) * len(row), 0) for row in inputs]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


_STOPS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[int]]] = WeakKeyDictionary()
"""Tokens that end an answer, and for how large a vocabulary they were found: finding them decodes all of it."""


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End of text, and every token whose text contains a newline."""
    size, stops = _STOPS.get(tokenizer, (-1, []))
    if size != len(tokenizer):
        stops = _find_stops(tokenizer)
        _STOPS[tokenizer] = len(tokenizer), stops
    return stops


def _find_stops(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    stops = {index for index, text in enumerate(texts) if "\n" in text}
    end = tokenizer.eos_token_id
    return sorted(stops | {end}) if isinstance(end, int) else sorted(stops)
