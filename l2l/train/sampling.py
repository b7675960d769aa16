"""Completions of prompts under keyed noise: the same noise at every point of a step, so that its losses are comparable.

A token is drawn by the Gumbel-max rule: the largest of logit / temperature + G, with G standard Gumbel noise for each token of
the vocabulary, has the distribution of the softmax (Maddison et al. 2014, arXiv:1411.0030, Section 2). G is a pure function of
(seed, step, place of the row in its batch, position of the token), by the hash that directions are made of. So a completion is
a pure function of the weights, the prompt and a key; and two models that differ little draw the same token wherever the order
of the sums is the same, which is what takes the variance of sampling out of the difference of two losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, final

import torch

from l2l.models import generator, uncompiled
from l2l.models.load import kind_of, unwrapped
from l2l.models.prompt_trees import Ids
from l2l.noise import Key, hash_bits
from l2l.tasks.encode import encoder_for, pad_rows
from l2l.tasks.evaluate import generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampler(Protocol):
    """Continues prompts with the weights that the model has at that moment."""

    def sample(self, prompts: Sequence[Ids], key: Key, places: Sequence[int]) -> list[Ids]:
        """Token ids of a completion of each prompt, in order, without the token that ends it.

        Args:
            prompts: token ids as the model is fed them, none empty.
            key: of the noise; the draw of one completion must depend on nothing but weights, prompt, key and place.
            places: of each prompt in its batch: unlike ones have independent noise.
        """
        ...


def gumbel_noise(key: Key, places: Sequence[int], position: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel noise, float64 [places, size], of each token of a vocabulary at a position of a completion."""
    bits = hash_bits([f"completion {place}" for place in places], key, size, position * size, device)
    uniform = (bits.to(torch.float64).remainder_(2.0**32) + 0.5) / 2.0**32  # the middle of each of 2^32 intervals of (0, 1)
    return uniform.log_().neg_().log_().neg_()


@final
class KeyedTokens:
    """A logits processor of transformers: its values are largest at the token that is drawn.

    Args:
        temperature: 0 draws the likeliest token.
    """

    def __init__(self, key: Key, places: Sequence[int], temperature: float) -> None:
        self._key, self._places, self._temperature = key, places, temperature
        self._position = 0  # of the next token: called once for each, whatever the ids before it are

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] of the next token: with noise, float64."""
        position, self._position = self._position, self._position + 1
        if not self._temperature:
            return scores
        noise = gumbel_noise(self._key, self._places, position, scores.shape[1], scores.device)
        return noise.add_(scores.double() / self._temperature)


@final
@dataclass(frozen=True)
class TransformersSampler:
    """Batches of left-padded prompts through the model's ``generate``, with a key-value cache.

    Args:
        model: a causal language model, in eval mode.
        max_new_tokens: most tokens of a completion; it ends earlier at a token that ends texts (the tokenizer's, and those of
            the model's generation config).
        temperature: the logits are divided by it; 0 takes the likeliest token.
        rows: most rows of a forward pass.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    max_new_tokens: int
    temperature: float = 1.0
    rows: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError where the model writes no texts."""
        if generator(self.model) is None or kind_of(self.model) != "causal":
            name = type(unwrapped(self.model)).__name__
            raise ValueError(f"rewards are of completions, and {name} writes none: give a causal language model")

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Ids], key: Key, places: Sequence[int]) -> list[Ids]:
        """As of :class:`Sampler`. The rows of a pass do not change each other's tokens, but for rounding."""
        from transformers import GenerationConfig

        continue_text: Any = generator(self.model)
        stops, pad = stop_ids(self.model, self.tokenizer), encoder_for(self.model).pad_id(self.tokenizer)
        config = GenerationConfig(  # a fresh one: a model's own may ask for other draws, penalties or beams
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad,
        )
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths together need less padding
        found: list[Ids] = [()] * len(prompts)
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            ids, mask = pad_rows([prompts[index] for index in chosen], pad, left=True)
            fed = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            tokens = KeyedTokens(key, [places[index] for index in chosen], self.temperature)
            with generation_config(self.model, config), uncompiled(self.model):  # its key-value cache grows with every token
                output = continue_text(**fed, generation_config=config, logits_processor=[tokens])
            for index, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                found[index] = tuple(row[:end])
        return found


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation config (a chat model's end of a turn)."""
    own = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int))
