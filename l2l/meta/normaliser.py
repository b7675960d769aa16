"""The normaliser that a tuner is learned under; that of curvature is measured on the pool first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l2l.blocks import Blocks
from l2l.meta.components import Components
from l2l.meta.config import MetaTrainConfig
from l2l.meta.labels import sampled_loss
from l2l.meta.pool import PoolTask
from l2l.meta.statistics import squared_norms
from l2l.noise import Key
from l2l.tuners.normalise import NORMALISERS, CurvatureNormaliser, EnergyNormaliser, Normaliser, build_normaliser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCHES = 8
"""Batches of every task that the curvature is averaged over."""


def check_normaliser(config: MetaTrainConfig) -> None:
    """Raise ValueError where there is no such normaliser, or it is asked for and switched off."""
    if config.normaliser not in NORMALISERS:
        raise ValueError(f"normaliser={config.normaliser!r} must be one of {', '.join(NORMALISERS)}")
    if config.normaliser != EnergyNormaliser.name and not config.normalise:
        raise ValueError(f"normalise is off, but normaliser is {config.normaliser!r}: leave one of them out")


def make_normaliser(config: MetaTrainConfig, model: PreTrainedModel, pool: Sequence[PoolTask]) -> Normaliser:
    """The normaliser of a configuration; for ``curvature``, with the traces of the model as it stands."""
    if config.normaliser == EnergyNormaliser.name:
        return EnergyNormaliser(config.embedding_rows_per_sample, config.batch_size, config.normalise)
    if config.normaliser == CurvatureNormaliser.name:
        return CurvatureNormaliser(model_traces(model, pool, config.seed))
    return build_normaliser(config.normaliser)


def model_traces(
    model: PreTrainedModel, pool: Sequence[PoolTask], seed: int, batches: int = BATCHES
) -> dict[str, float]:
    """Trace of the Gauss-Newton matrix by block, mean over the tasks' first batches: labels drawn from the model.

    One forward and backward pass per batch; nothing is kept but a number per block.
    """
    blocks = Blocks.of(model)
    components = Components(blocks)
    total = components.zeros()
    for index, task in enumerate(pool):
        for number in range(batches):
            drawn = sampled_loss(model, task.feeder.at(number), task.feeder.form, Key(seed, number, index))
            total += drawn.count * squared_norms(blocks, components, drawn.closure)
    return dict(zip(blocks.names, (total / (batches * len(pool))).tolist(), strict=True))
