"""Loss and metric of a model on the rows of a task."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from l2l.models.buckets import Grouping
from l2l.models.heads import token_logprobs
from l2l.models.load import context_length
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import Batch, Encoded, collate, encode, padding_id
from l2l.tasks.generate import generate
from l2l.tasks.layout import lay_out
from l2l.tasks.losses import classification_loss, gold_token_sum, option_scores, predictions
from l2l.tasks.metrics import accuracy, answer_scores

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
) -> Scores:
    """Score a model in eval mode; its mode is put back afterwards.

    The loss does not depend on ``batch_size``: sums are taken over all rows before dividing. A prediction is
    right if it is among the example's correct options.

    Args:
        model, tokenizer: a causal language model, on any device.
        task, rows: what to score on; at least one row.
        batch_size: examples per forward pass; each brings its options.
        max_length: most tokens of prompt and option; ``None`` takes the model's context, at most 2048.
        progress: show a bar.
        grouping: says how long a row may be in which options share their prompt. ``None`` asks the model, where some
            example has options for it; a caller that evaluates often gives what it found once. Batches are fed whole.

    Raises:
        ValueError: there are no rows, one cannot be rendered or encoded, or ``max_length`` is more than the model's
            positions.
    """
    if not rows:
        raise ValueError(f"task {task.name!r}: no rows to evaluate on")
    limit = context_length(model, max_length)
    with _eval_mode(model):
        encoded = encode(task, rows, tokenizer, limit)
        sharing = _sharing(model, encoded) if grouping is None else replace(grouping, groups=1)
        loss, chosen = _score_options(model, task, encoded, padding_id(tokenizer), batch_size, progress, sharing)
        if task.metric == "f1":
            examples = [task.example(row) for row in rows]
            texts = generate(model, tokenizer, [example.prompt for example in examples], limit, batch_size=batch_size)
            value, _ = answer_scores(texts, [example.answers for example in examples])
        else:
            value = accuracy(chosen, [example.gold for example in encoded])
    return Scores(loss, task.metric, value, len(rows))


def _sharing(model: PreTrainedModel, encoded: list[Encoded]) -> Grouping:
    """What the model says about rows that branch, asked only where some example would have one."""
    anything = Grouping(tree=sys.maxsize)
    wanted = any(lay_out([[option.ids[:-1] for option in one.options]], anything).branching for one in encoded)
    return Grouping.of(model, 1) if wanted else Grouping()


def _score_options(
    model: PreTrainedModel,
    task: Task,
    encoded: list[Encoded],
    pad_id: int,
    batch_size: int,
    progress: bool,
    grouping: Grouping,
) -> tuple[float, list[int]]:
    """Mean loss, and the best scored option of each example."""
    from tqdm import tqdm

    # Long examples first: memory runs out at once or not at all, and like lengths share a batch.
    order = sorted(range(len(encoded)), key=lambda index: -max(len(option.ids) for option in encoded[index].options))
    chosen = [0] * len(encoded)
    total, weight = 0.0, 0
    for start in tqdm(range(0, len(order), batch_size), desc=task.name, disable=not progress):
        indices = order[start : start + batch_size]
        batch = collate([encoded[index] for index in indices], "classification", pad_id, model.device, grouping)
        batch_total, batch_weight, best = _score_batch(model, task, batch)
        total, weight = total + batch_total, weight + batch_weight
        for index, choice in zip(indices, best, strict=True):
            chosen[index] = choice
    return total / weight, chosen


def _score_batch(model: PreTrainedModel, task: Task, batch: Batch) -> tuple[float, int, list[int]]:
    """Summed loss, what to divide it by, and the best option per example."""
    logprobs = token_logprobs(model, batch, batch.parts)
    scores = option_scores(logprobs, batch)
    best = predictions(scores, batch).tolist()
    if task.form == "lm":
        total, count = gold_token_sum(logprobs, batch)
        return -total.item(), int(count), best
    return classification_loss(scores, batch).item() * batch.n, batch.n, best


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
