"""The normaliser that a tuner is learned under; that of curvature is measured on the pool first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from l2l.meta.config import MetaTrainConfig
from l2l.meta.labels import sampled_loss
from l2l.meta.pool import PoolTask
from l2l.meta.statistics import Components, squared_norms
from l2l.noise import Key
from l2l.params.blocks import Blocks
from l2l.tuners.model import bind
from l2l.tuners.normalize import NORMALIZERS, CurvatureNormalizer, EnergyNormalizer, Normalizer, build_normalizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCHES = 8
"""Batches of every task that the curvature is averaged over."""
FLOOR = 1e-6
"""Least trace of a block, as a share of the mean over the blocks: what the loss does not reach has none, up to rounding,
and may be perturbed at next to no cost, but not without bounds."""


def check_normaliser(config: MetaTrainConfig) -> None:
    """Raise ValueError where there is no such normaliser, or it is asked for and switched off."""
    if config.normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={config.normalizer!r} must be one of {', '.join(NORMALIZERS)}")
    if config.normalizer != EnergyNormalizer.name and not config.normalise:
        raise ValueError(f"normalise is off, but normalizer is {config.normalizer!r}: leave one of them out")


def make_normaliser(
    config: MetaTrainConfig,
    model: PreTrainedModel,
    pool: Sequence[PoolTask],
    basis: Mapping[str, Tensor] | None = None,
) -> Normalizer:
    """The normaliser of a configuration; for ``curvature``, with the traces of the model as it stands.

    Args:
        basis: the tuner's, by block name.
    """
    if config.normalizer == EnergyNormalizer.name:
        return EnergyNormalizer(config.embedding_rows_per_sample, config.batch_size, config.normalise)
    if config.normalizer == CurvatureNormalizer.name:
        return CurvatureNormalizer(*model_traces(model, pool, config.seed, basis=basis))
    return build_normalizer(config.normalizer)


def model_traces(
    model: PreTrainedModel,
    pool: Sequence[PoolTask],
    seed: int,
    batches: int = BATCHES,
    basis: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Traces of the Gauss-Newton matrix by block, and along the noise inside the basis, (n / r) E|g V|^2, by block with one.

    Means over the tasks' first batches, labels drawn from the model. One forward and backward pass per batch; nothing is
    kept but a number per trace.
    """
    blocks = Blocks.of(model)
    bound = bind(basis or {}, blocks)
    components = Components(blocks, bound.vectors if bound else None)
    total = components.zeros()
    for index, task in enumerate(pool):
        for number in range(batches):
            drawn = sampled_loss(model, task.feeder.at(number), task.feeder.form, Key(seed, number, index))
            total += drawn.count * squared_norms(blocks, components, drawn.closure)
    found = floored(total / (batches * len(pool)), len(blocks)).tolist()
    dense, inside = found[: len(blocks)], found[len(blocks) :]
    return dict(zip(blocks.names, dense, strict=True)), {
        blocks.names[i]: trace for i, trace in zip(components.bases, inside, strict=True)
    }


def floored(traces: Tensor, blocks: int) -> Tensor:
    """[components] traces, each at least ``FLOOR`` of the mean over the first ``blocks``. NaN stays."""
    return traces.clamp(min=FLOOR * traces[:blocks].mean().item())
