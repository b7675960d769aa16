"""Log-probabilities of chosen tokens, with logits computed only where they are needed.

A vocabulary is tens of thousands wide and a prompt hundreds of tokens long, but an option is a token or two:
full logits would be most of the memory of a forward pass and a good part of its time.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional


class TokenQuery(Protocol):
    """Rows to feed and K tokens to read: rows[k], positions[k] is where targets[k] is predicted."""

    @property
    def input_ids(self) -> Tensor:
        """[R, T] right-padded rows."""
        ...

    @property
    def attention_mask(self) -> Tensor:
        """[R, T] 1 on tokens, 0 on padding."""
        ...

    @property
    def rows(self) -> Tensor:
        """[K] the row in which a token is predicted."""
        ...

    @property
    def positions(self) -> Tensor:
        """[K] the column whose logits predict it."""
        ...

    @property
    def targets(self) -> Tensor:
        """[K] its id."""
        ...


def token_logprobs(model: nn.Module, batch: TokenQuery) -> Tensor:
    """[K] float32 log-probabilities of ``batch.targets``, differentiable where gradients are on.

    ``model`` is a causal language model of transformers. While it runs, its output embedding sees the K gathered
    hidden states as one row, so whatever the model does to its logits (scale, soft cap) still happens. A model
    without an output embedding, or one that does not call it exactly once on [R, T, D], gives full logits instead.
    """
    logits = _logits_at(model, batch)
    return -functional.cross_entropy(logits.float(), batch.targets, reduction="none")


def _logits_at(model: nn.Module, batch: TokenQuery) -> Tensor:
    """[K, vocabulary] logits."""
    head = _output_embedding(model)
    if head is not None:
        logits = _gathered(model, head, batch)
        if logits is not None:
            return logits
    return _forward(model, batch)[batch.rows, batch.positions]


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def _gathered(model: nn.Module, head: nn.Module, batch: TokenQuery) -> Tensor | None:
    """Logits at the K positions, or None where the model's head is not used in the expected way."""
    shapes: list[tuple[int, ...]] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        shapes.append(tuple(hidden.shape[:2]))
        return (hidden[batch.rows, batch.positions][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        logits = _forward(model, batch)
    finally:
        handle.remove()
    expected = shapes == [tuple(batch.input_ids.shape)] and logits.shape[:2] == (1, len(batch.targets))
    return logits[0] if expected else None


def _forward(model: nn.Module, batch: TokenQuery) -> Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
