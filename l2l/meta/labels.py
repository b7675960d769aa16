"""Losses under labels that the model draws itself: what a Fisher (Gauss-Newton) trace is estimated from.

Per-example gradients of such a loss have mean zero and are independent, so that of n examples n * ||gradient of the mean
loss||^2 is an unbiased estimate of the trace of the Gauss-Newton matrix of the mean loss, from one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2l.models.heads import token_logprobs
from l2l.noise import Key
from l2l.tasks.encode import Batch, Form
from l2l.tasks.losses import classification_loss, lm_loss, option_scores, predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SampledLoss:
    """A loss under drawn labels."""

    closure: Callable[[], Tensor]
    count: int
    """Independent labels that the loss is the mean over."""
    passes: int
    """What one gradient of it costs; a backward pass counts as two."""


def sampled_loss(model: PreTrainedModel, batch: Batch, form: Form, key: Key) -> SampledLoss:
    """The loss of a batch under labels drawn anew from the model at the parameters as they stand.

    For classification the option is drawn from the softmax of the options' scores. For ``lm`` each gold token is drawn
    given the true ones before it; one more forward pass, with logits at all positions.
    """
    seed = key.words("drawn labels")[0]
    if form == "lm":
        gold = batch.option_slot == batch.gold[batch.option_example]
        return SampledLoss(lambda: _token_loss(model, batch, seed), int(gold[batch.options].sum()), 4)
    return SampledLoss(lambda: _option_loss(model, batch, seed), batch.n, 3)


def _gumbel(like: Tensor, seed: int) -> Tensor:
    """Gumbel noise: the largest of scores with it added is a draw from their softmax."""
    draw = torch.Generator().manual_seed(seed)
    uniform = torch.rand(like.shape, generator=draw, dtype=torch.float64).clamp_(1e-300, 1 - 1e-16)
    return -torch.log(-torch.log(uniform)).to(like.device)


def _option_loss(model: PreTrainedModel, batch: Batch, seed: int) -> Tensor:
    scores = option_scores(token_logprobs(model, batch, batch.parts), batch)
    drawn = predictions(scores.detach().double() + _gumbel(scores, seed), batch)
    return classification_loss(scores, replace(batch, gold=drawn))


def _token_loss(model: PreTrainedModel, batch: Batch, seed: int) -> Tensor:
    with torch.no_grad():
        rows = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = rows[batch.rows, batch.positions].double()
        targets = (logits + _gumbel(logits, seed)).argmax(-1)
    parts = tuple(replace(part, targets=targets[part.tokens]) for part in batch.parts)
    drawn = replace(batch, targets=targets, parts=parts)
    return lm_loss(token_logprobs(model, drawn, drawn.parts), drawn)
