"""Losses and logits of a batch, and option scores and predictions, from token log-probabilities. Everything is float32.

Sums run over small padded tables with a fixed order, so a loss has the same bits in every run on every device.
"""

from collections.abc import Callable

import torch

from l2l.models.heads import JoinedParts, LinearRest, read_logits, read_states, target_logprobs, token_logits, token_logprobs
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
    is chosen at the first evaluation, so that differences between evaluations are of the same tokens. With gradients on,
    everything is exact.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Batch,
        form: Form,
        top: int = TOP_LOGITS,
        near: bool = False,
        head_displaced: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            near: whether all evaluations lie near the first one, so that what the rest of the vocabulary adds may be linear in
                the hidden states about it (:class:`l2l.models.heads.LinearRest`).
            head_displaced: whether the head may have other weights now than at theta, where the first evaluation is; such
                evaluations are exact. None: a trained head always may.
        """
        self.model, self.batch, self.form, self.top, self.near = model, batch, form, top, near
        self.head_displaced = head_displaced
        # By the identity of the first part of parts that are joined:
        self._chosen: dict[int, torch.Tensor] = {}  # [k, top] other tokens
        self._rests: dict[int, LinearRest | None] = {}

    @property
    def keeps_first(self) -> bool:
        """Whether later evaluations are made with what the first one found."""
        return self.form == "lm" or (self.near and not self.batch.one_place)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            return self._outputs(near=False)
        with torch.inference_mode():
            displaced = self.head_displaced is not None and self.head_displaced()
            logits, targets = self._outputs(self.near and not displaced)
        return logits.clone(), targets.clone()  # outside inference mode copies are tensors like any others

    def _outputs(self, near: bool) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch
        if self.form == "classification":
            one_place = batch.one_place
            scores = relative_scores(self.model, batch) if one_place else option_scores(self._read(near), batch)
            return _score_table(scores, batch), batch.gold
        rows = self._read(near)[_of_gold_tokens(batch)]
        return rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    def _read(self, near: bool) -> torch.Tensor:
        """[K] log-probabilities of a classification's tokens; [K, top + 2] rows of a language model's."""
        where = self.model, self.batch, self.batch.parts
        if near and self._rests and None not in self._rests.values():
            return read_states(*where, self._near_first)
        if not near or self._rests:
            return read_logits(*where, self._exactly)
        states: dict[int, torch.Tensor] = {}

        def note(found: torch.Tensor, joined: JoinedParts) -> None:
            states[id(joined.parts[0])] = found

        def first(logits: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
            which = id(joined.parts[0])
            own = states.pop(which, None)
            self._rests[which] = None if own is None else self._rest(own, logits, joined)
            if own is None or self._rests[which] is None:
                return self._exactly(logits, joined)
            return self._near_first(own, joined)  # by the same sums as later, so that their rounding cancels in differences

        return read_logits(*where, first, note=note)

    def _exactly(self, logits: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
        if self.form == "classification":
            return target_logprobs(logits, joined)
        of_tokens = logits[joined.places]
        some = self._some(of_tokens, joined)
        rest = of_tokens.scatter(1, some, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([of_tokens.gather(1, some), rest], 1)

    def _some(self, logits: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
        """[k, 1 + top] the right token and the chosen others, from logits [k, vocabulary]."""
        right, which = joined.targets[:, None], id(joined.parts[0])
        if which not in self._chosen:
            count = min(self.top, logits.shape[1] - 2)
            self._chosen[which] = logits.scatter(1, right, -torch.inf).topk(count, 1).indices
        return torch.cat([right, self._chosen[which]], 1)

    def _rest(self, states: torch.Tensor, logits: torch.Tensor, joined: JoinedParts) -> LinearRest | None:
        unperturbed = self.head_displaced is not None
        if self.form == "classification":  # per place
            return LinearRest.about(self.model, states, logits, joined.places.new_empty(len(states), 0), unperturbed)
        places = joined.places
        return LinearRest.about(self.model, states[places], logits[places], self._some(logits[places], joined), unperturbed)

    def _near_first(self, states: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
        rest = self._rests[id(joined.parts[0])]
        assert rest is not None, "all parts have one"
        return rest.target_logprobs(states, joined) if self.form == "classification" else rest(states[joined.places])


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
