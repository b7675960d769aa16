"""How good a tuner is now: the loss that a short zeroth-order run reaches with it, from the initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from l2l.finetune.control import ControlState, StepControl
from l2l.finetune.step import zo_step
from l2l.meta.pool import PoolTask
from l2l.methods.base import Method
from l2l.noise import Key
from l2l.perturb import Theta
from l2l.tasks.encode import Batch
from l2l.tasks.evaluate import evaluate
from l2l.tasks.losses import batch_loss

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
    control: StepControl | None = None,
) -> float:
    """Dev loss after ``steps`` steps of a method on a task; infinite if the run diverged. Theta stays where they led.

    The same seed gives every method the same batches and the same noise.

    Args:
        control: for runs at ``lr="auto"``; ``lr`` is beta then.
    """
    state, rates, seen = method.init(theta.blocks), [lr] * len(theta.blocks), ControlState()
    try:
        for step in range(steps):
            batch, key = pool.feeder.at(step), Key(seed, step)

            def closure(batch: Batch = batch) -> Tensor:
                return batch_loss(model, batch, pool.feeder.form)

            state, report = zo_step(closure, theta, method, state, key, rates, control=control, control_state=seen)
            seen = report.control
    except FloatingPointError:
        return float("inf")
    return evaluate(model, tokenizer, pool.task, pool.dev, grouping=pool.feeder.grouping).loss
