"""Losses of a batch, and option scores and predictions, from token log-probabilities. Everything is float32.

Sums run over small padded tables with a fixed order, so a loss has the same bits in every run on every device.
"""

import torch

from l2l.models.heads import token_logprobs
from l2l.tasks.encode import Batch, Form


def batch_loss(model: torch.nn.Module, batch: Batch, form: Form) -> torch.Tensor:
    """Float32 scalar training loss of a model on a batch encoded for its kind, differentiable where gradients are on.

    ``form`` is the task's: cross entropy over mean option log-probabilities, or over the gold option's tokens.
    Where the batch has parts, each is a forward pass of its own; the loss is the same up to rounding.
    The batch must lie on the model's device; train or eval mode is left as it is. Where gradients are off, the model
    runs in inference mode.
    """
    if torch.is_grad_enabled():
        return _loss(model, batch, form)
    with torch.inference_mode():
        loss = _loss(model, batch, form)
    return loss.clone()  # outside inference mode a copy is a tensor like any other


def _loss(model: torch.nn.Module, batch: Batch, form: Form) -> torch.Tensor:
    logprobs = token_logprobs(model, batch, batch.parts)
    if form == "lm":
        return lm_loss(logprobs, batch)
    return classification_loss(option_scores(logprobs, batch), batch)


def option_scores(logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[K] token log-probabilities to [O] option scores: the mean over each option's tokens."""
    lengths = torch.bincount(batch.options, minlength=len(batch.option_example))
    return option_sums(logprobs, batch) / lengths


def option_sums(logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[K] token log-probabilities to [O] log-probabilities of whole options: the sum over each option's tokens."""
    table = logprobs.new_zeros(len(batch.option_example), batch.longest)
    return table.index_put((batch.options, batch.token_slot), logprobs).sum(1)


def _score_table(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[O] to [E, width]; an example with fewer options is filled up with minus infinity."""
    empty = scores.new_full((batch.n, batch.width), -torch.inf)
    return empty.index_put((batch.option_example, batch.option_slot), scores)


def classification_loss(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy with the option scores as logits, averaged over examples. Scalar.

    The scores are mean log-probabilities, taken as they are: no temperature, no calibration.
    """
    return torch.nn.functional.cross_entropy(_score_table(scores, batch), batch.gold)


def lm_loss(token_logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Negative mean of the log-probabilities of all gold tokens of the batch. Scalar.

    The mean is over tokens, so an example with a longer answer weighs more.
    """
    total, count = gold_token_sum(token_logprobs, batch)
    return -total / count


def gold_token_sum(token_logprobs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and number of the gold tokens' log-probabilities, of which a mean over several batches is made."""
    is_gold = batch.option_slot == batch.gold[batch.option_example]
    chosen = is_gold[batch.options]
    return torch.where(chosen, token_logprobs, 0.0).sum(), chosen.sum()


def predictions(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[E] index of the best scored option of each example; the first one where scores are equal."""
    return _score_table(scores, batch).argmax(1)
