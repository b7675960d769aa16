"""An outer step: what it takes over from the one before, and the state that its objective is evaluated at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from l2l.meta.config import MetaTrainConfig
from l2l.meta.curvature import sampled_loss
from l2l.meta.pool import MetaInputs
from l2l.meta.state import MetaState
from l2l.methods.learned import Learned
from l2l.noise import Key
from l2l.params import PerturbedParameters
from l2l.tuners.features import RunStatistics


@dataclass(frozen=True)
class OuterStep:
    """Which outer step it is, and what it takes over from the one before."""

    step: int
    task: int
    """Of the pool."""
    number: int
    """Which of the task's batches."""
    history: RunStatistics
    memory: Mapping[str, Tensor]
    """Of the objective."""


def learned_method(inputs: MetaInputs, config: MetaTrainConfig) -> Learned:
    """The method that the tuner learns for."""
    horizon = max(1, config.restart_every // len(inputs.pool)) if config.restart_histories else None
    return Learned(inputs.tuner, epsilon=config.epsilon, horizon=horizon)


def meta_state(
    inputs: MetaInputs,
    config: MetaTrainConfig,
    theta: PerturbedParameters,
    method: Learned,
    at: OuterStep,
    consume: Callable[[int, Tensor], None] | None = None,
) -> MetaState:
    """The model at an outer step, seen through a batch of its task."""
    model, task, key = inputs.model, inputs.pool[at.task], Key(config.seed, at.step)
    batcher, batch = task.batcher, task.batcher.at(at.number)
    return MetaState(
        closure=task.loss(model, batch),
        other=task.loss(model, batcher.further(at.step, 0)),
        further=lambda i: task.loss(model, batcher.further(at.step, i + 1)),
        theta=theta,
        method=method,
        history=at.history,
        key=key,
        lr=config.lr,
        consume=consume,
        sampled=lambda probe: sampled_loss(model, batch, batcher.form, key.with_draw(probe)),
        memory=at.memory,
    )
