"""Loss and metric of a model on the rows of a task."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from l2l.models.batching import Grouping
from l2l.models.heads import token_logprobs
from l2l.models.load import context_length
from l2l.tasks.base import Row, Task
from l2l.tasks.calibrate import calibrated_choice, without_context
from l2l.tasks.encode import Batch, Encoded, collate
from l2l.tasks.generate import generate
from l2l.tasks.intervals import interval
from l2l.tasks.layout import lay_out
from l2l.tasks.losses import classification_loss, gold_token_sum, option_scores, option_sums, predictions
from l2l.tasks.metrics import accuracy, answer_scores
from l2l.tasks.reader import reader_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """How good a model is on a task."""

    loss: float
    """In the task's own form, in nats: the mean over examples (classification) or over gold tokens (lm)."""
    metric: str
    """``accuracy`` or ``f1``."""
    value: float
    """The metric, between 0 and 1."""
    n: int
    """How many rows were scored."""
    official: dict[str, float] = field(default_factory=dict, hash=False)
    """The benchmark's own metrics, by name, between 0 and 1, where they differ from ``value``."""
    rowwise: tuple[float, ...] = field(default=(), repr=False)
    """The metric of each row, in order; its mean is ``value`` up to rounding."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``value`` over draws of the rows; see :func:`l2l.tasks.intervals.interval`."""
        return interval(self.rowwise)

    def plain(self) -> dict[str, Any]:
        """What a summary holds: the figures, the interval, and no row by itself."""
        kept = {name: value for name, value in vars(self).items() if name != "rowwise"}
        return kept | {"interval": list(self.interval)}


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = False,
    grouping: Grouping | None = None,
    calibrate: bool = False,
    max_new_tokens: int = 50,
) -> Scores:
    """Score a model in eval mode; its mode is put back afterwards.

    The loss does not depend on ``batch_size``: sums are taken over all rows before dividing. A prediction is
    right if it is among the example's correct options.

    Args:
        model, tokenizer: a language model of any kind (:mod:`l2l.models.kinds`), on any device.
        task, rows: what to score on; at least one row.
        batch_size: examples per forward pass; each brings its options.
        max_length: most tokens of prompt and option; ``None`` takes the model's context, at most 2048.
        progress: show a bar.
        grouping: says how long a row may be in which options share their prompt. ``None`` asks the model, where some
            example has options for it; a caller that evaluates often gives what it found once. Batches are fed whole.
        calibrate: choose the option whose log-probability rises most over that after the task's context-less prompt
            (:mod:`l2l.tasks.calibrate`). The loss stays uncalibrated.
        max_new_tokens: most tokens of a generated answer.

    Raises:
        ValueError: there are no rows, one cannot be rendered or encoded, ``max_length`` is more than the model's
            positions, or ``calibrate`` is asked of a task without a context-less prompt.
    """
    if not rows:
        raise ValueError(f"task {task.name!r}: no rows to evaluate on")
    bare = without_context(task) if calibrate else None
    limit, reader = context_length(model, max_length), reader_for(model)
    pad_id = reader.pad_id(tokenizer)
    with _eval_mode(model):
        encoded = reader.encode(task, rows, tokenizer, limit)
        sharing = _sharing(model, encoded) if grouping is None else replace(grouping, groups=1)
        read = _score_options(model, task, encoded, pad_id, batch_size, progress, sharing)
        chosen = read.chosen
        if bare is not None:
            alone = reader.encode(bare, rows, tokenizer, limit)
            chosen = _calibrated(model, bare, read, alone, pad_id, batch_size, progress)
        examples = [task.example(row) for row in rows] if task.metric == "f1" or task.official else []
        if task.metric == "f1":
            prompts = [example.prompt for example in examples]
            texts = generate(model, tokenizer, prompts, limit, max_new_tokens, batch_size)
            value, _ = answer_scores(texts, [example.answers for example in examples])
            rowwise = [answer_scores([t], [e.answers])[0] for t, e in zip(texts, examples, strict=True)]
        else:
            texts = [example.options[choice] for example, choice in zip(examples, chosen, strict=False)]
            value = accuracy(chosen, [example.gold for example in encoded])
            rowwise = [float(choice in example.gold) for choice, example in zip(chosen, encoded, strict=True)]
    official = {} if task.official is None else task.official(rows, texts)
    return Scores(read.loss, task.metric, value, len(rows), official, tuple(rowwise))


@dataclass(frozen=True)
class _Read:
    """What the forward passes over the options say."""

    loss: float
    chosen: list[int]
    """The best scored option of each example."""
    sums: list[list[float]]
    """The log-probability of each example's options, in nats."""


def _calibrated(
    model: PreTrainedModel,
    bare: Task,
    read: _Read,
    alone: list[Encoded],
    pad_id: int,
    batch_size: int,
    progress: bool,
) -> list[int]:
    """The best option of each example after its log-probability without context is taken off.

    Many rows share a context-less prompt, so each is scored once.
    """
    distinct = list(dict.fromkeys(alone))
    sums = _score_options(model, bare, distinct, pad_id, batch_size, progress, _sharing(model, distinct)).sums
    found = dict(zip(distinct, sums, strict=True))
    return [calibrated_choice(whole, found[one]) for whole, one in zip(read.sums, alone, strict=True)]


def _sharing(model: PreTrainedModel, encoded: list[Encoded]) -> Grouping:
    """What the model says about rows that branch, asked only where some example would have one."""
    anything = Grouping(tree=sys.maxsize)
    plain = [one for one in encoded if not one.whole]
    wanted = any(lay_out([[option.fed for option in one.options]], anything).branching for one in plain)
    return Grouping.of(model, 1) if wanted else Grouping()


def _score_options(
    model: PreTrainedModel,
    task: Task,
    encoded: list[Encoded],
    pad_id: int,
    batch_size: int,
    progress: bool,
    grouping: Grouping,
) -> _Read:
    """Mean loss, the best scored option of each example, and what its options are worth."""
    from tqdm import tqdm

    # Long examples first: memory runs out at once or not at all, and like lengths share a batch.
    order = sorted(range(len(encoded)), key=lambda index: -max(len(option.ids) for option in encoded[index].options))
    chosen = [0] * len(encoded)
    sums: list[list[float]] = [[]] * len(encoded)
    total, weight = 0.0, 0
    for start in tqdm(range(0, len(order), batch_size), desc=task.name, disable=not progress):
        indices = order[start : start + batch_size]
        batch = collate([encoded[index] for index in indices], "classification", pad_id, model.device, grouping)
        batch_total, batch_weight, best, values = _score_batch(model, task, batch)
        total, weight = total + batch_total, weight + batch_weight
        for index, choice in zip(indices, best, strict=True):
            chosen[index] = choice
            sums[index], values = values[: len(encoded[index].options)], values[len(encoded[index].options) :]
    return _Read(total / weight, chosen, sums)


def _score_batch(model: PreTrainedModel, task: Task, batch: Batch) -> tuple[float, int, list[int], list[float]]:
    """Summed loss, what to divide it by, the best option per example, and every option's log-probability."""
    logprobs = token_logprobs(model, batch, batch.parts)
    scores = option_scores(logprobs, batch)
    best, sums = predictions(scores, batch).tolist(), option_sums(logprobs, batch).tolist()
    if task.form == "lm":
        total, count = gold_token_sum(logprobs, batch)
        return -total.item(), int(count), best, sums
    return classification_loss(scores, batch).item() * batch.n, batch.n, best, sums


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
