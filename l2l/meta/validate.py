"""How good a tuner is now: the loss that a short zeroth-order run reaches with it, from the initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2l.finetune.step import zo_step
from l2l.meta.pool import PoolTask
from l2l.methods.base import Method
from l2l.noise import Key
from l2l.perturb import Theta
from l2l.tasks.closure import batch_loss
from l2l.tasks.evaluate import evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def short_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    theta: Theta,
    pool: PoolTask,
    method: Method[Any],
    steps: int,
    lr: float,
    seed: int,
) -> float:
    """Dev loss after ``steps`` steps of a method on a task; infinite if the run diverged. Theta stays where they led.

    The same seed gives every method the same batches and the same noise.
    """
    state, rates = method.init(theta.blocks), [lr] * len(theta.blocks)
    try:
        for step in range(steps):
            batch = pool.feeder.at(step)
            state, _ = zo_step(
                lambda batch=batch: batch_loss(model, batch, pool.feeder.form),
                theta,
                method,
                state,
                Key(seed, step),
                rates,
            )
    except FloatingPointError:
        return float("inf")
    return evaluate(model, tokenizer, pool.task, pool.dev, grouping=pool.feeder.grouping).loss
