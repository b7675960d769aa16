"""Losses and logits of a batch, and option scores and predictions, from token log-probabilities. Everything is float32.

Sums run over small padded tables with a fixed order, so a loss has the same bits in every run on every device.
"""

import torch

from l2l.models.heads import JoinedParts, read_logits, token_logits, token_logprobs
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
    if form == "lm":
        return lm_loss(token_logprobs(model, batch, batch.parts), batch)
    return classification_loss(relative_scores(model, batch), batch)


TOP_LOGITS = 64
"""Tokens beside the right one whose logits :class:`BatchLogits` returns at a position of an answer; the rest are one more.
Their probabilities sum to nearly 1, so the Gauss-Newton matrix loses little, and outputs stay small beside a vocabulary's."""


class BatchLogits:
    """A closure: (logits, targets) of a batch, whose cross entropy is :func:`batch_loss`.

    Of a classification, the table of option scores [E, width] and the index of the right option; an option that an example
    lacks has minus infinity. Of language modelling, a row per token of the answers: the logit of the right token, those of the
    ``top`` likeliest others, and the log of the summed exponentials of all that remain; the target is 0. Which tokens these are
    is chosen at the first evaluation, so that differences between evaluations are of the same tokens.
    """

    def __init__(self, model: torch.nn.Module, batch: Batch, form: Form, top: int = TOP_LOGITS) -> None:
        self.model, self.batch, self.form, self.top = model, batch, form, top
        self._chosen: dict[int, torch.Tensor] = {}  # by the identity of the first part: [k, top] other tokens

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            return self._outputs()
        with torch.inference_mode():
            logits, targets = self._outputs()
        return logits.clone(), targets.clone()  # outside inference mode copies are tensors like any others

    def _outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch
        if self.form == "classification":
            scores = relative_scores(self.model, batch)
            return _score_table(scores, batch), batch.gold
        rows = read_logits(self.model, batch, batch.parts, self._lumped)[_of_gold_tokens(batch)]
        return rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    def _lumped(self, of_places: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
        logits, right, which = of_places[joined.places], joined.targets[:, None], id(joined.parts[0])
        if which not in self._chosen:
            count = min(self.top, logits.shape[1] - 2)
            self._chosen[which] = logits.scatter(1, right, -torch.inf).topk(count, 1).indices
        some = torch.cat([right, self._chosen[which]], 1)
        rest = logits.scatter(1, some, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([logits.gather(1, some), rest], 1)


def relative_scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """[O] :func:`option_scores` up to a number per example, which neither the loss nor the choice of an option depends on.

    Where the options of every example are one token each at one place, that number is the normaliser over the vocabulary:
    it is not computed, and the scores are logits.
    """
    if batch.one_place:
        return option_scores(token_logits(model, batch, batch.parts), batch)
    return option_scores(token_logprobs(model, batch, batch.parts), batch)


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
    chosen = _of_gold_tokens(batch)
    return torch.where(chosen, token_logprobs, 0.0).sum(), chosen.sum()


def _of_gold_tokens(batch: Batch) -> torch.Tensor:
    """[K] bool: which tokens belong to the option to train on."""
    return (batch.option_slot == batch.gold[batch.option_example])[batch.options]


def predictions(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[E] index of the best scored option of each example; the first one where scores are equal."""
    return _score_table(scores, batch).argmax(1)
