"""Sigma per block without learning: from gradients, or by boosting one block. Tables for the controls.

What a tuner must beat to have learned something: contenders modelled on it, without what it learned.

Each takes over the tuner's step control, method arguments and normaliser, so that only sigma, the basis or the turns differ.
Controls of sigma move all blocks at every step: turns are learned. Tables of sigma are tuners like any other, on disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from l2l.estimators.backward import consume_gradients
from l2l.estimators.finite_difference import Closure
from l2l.experiments.runner import shared_options
from l2l.experiments.spec import (
    BASELINE_DIZO,
    BASELINE_MEZO,
    CONTROL,
    CONTROLS,
    Contender,
    Entry,
    MetaEvaluateConfig,
    freeze,
)
from l2l.experiments.validation import Prepared
from l2l.models.batching import Grouping
from l2l.models.load import context_length
from l2l.optim import Schedule
from l2l.params.blocks import Block, Blocks
from l2l.tasks import get_task
from l2l.tasks.encode import encoder_for
from l2l.tasks.losses import batch_loss
from l2l.tasks.rows import load_splits
from l2l.train.inputs import Batcher
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics
from l2l.tuners.model import Provenance, random_basis, ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 0.1
"""Sigma of a block whose gradients do not agree over batches, beside a root mean square of 1: small, not frozen."""
BOOST = 4.0
"""Sigma of the boosted block, beside 1."""


def gradient_agreement(closures: Sequence[Closure], blocks: Blocks) -> Tensor:
    """G_b [blocks] float64, an unbiased estimate of the squared norm of the full gradient per block.

    The mean of <g_i, g_j> over all pairs of different batches: (|sum g|^2 - sum |g|^2) / (n (n - 1)). One gradient is
    kept in memory. An estimate may be negative.

    Raises:
        ValueError: fewer than two batches.
    """
    count = len(closures)
    if count < 2:
        raise ValueError(f"{count} batches: agreement is between two at least")
    sums: dict[int, Tensor] = {}
    squares = torch.zeros(len(blocks), dtype=torch.float64)

    def take(index: int, gradient: Tensor) -> None:
        squares[index] += gradient.double().square().sum().item()
        sums[index] = gradient.double() + sums.get(index, 0.0)

    for closure in closures:
        consume_gradients(closure, blocks, take)
    whole = torch.tensor([float(sums[i].square().sum()) if i in sums else 0.0 for i in range(len(blocks))])
    return (whole.double() - squares) / (count * (count - 1))


def task_agreement(model: PreTrainedModel, feeder: Batcher, batches: int) -> Tensor:
    """:func:`gradient_agreement` [blocks] of a model on the first batches of a task, at its weights as they stand."""

    def loss(number: int) -> Tensor:
        return batch_loss(model, feeder.at(number), feeder.form)

    return gradient_agreement([partial(loss, number) for number in range(batches)], Blocks.of(model))


def sigma_from(agreements: Sequence[Tensor], blocks: Blocks) -> Tensor:
    """Sigma [blocks] float32 with sigma^2 proportional to G_b / d_b, mean square 1 over all coordinates.

    Each task's G is divided by its sum first, so that tasks weigh alike; negative ones count as 0, and no sigma is below
    :data:`LEAST`.

    Raises:
        ValueError: on no task do the gradients of any block agree.
    """
    shares = [found.clamp(min=0) / found.clamp(min=0).sum() for found in agreements if (found > 0).any()]
    if not shares:
        raise ValueError("the gradients of different batches agree in no block: take more batches (control_batches)")
    sizes = torch.tensor([block.numel for block in blocks], dtype=torch.float64)
    square = torch.stack(shares).mean(0) / sizes
    return (square * sizes.sum() / (square * sizes).sum()).sqrt().clamp(min=LEAST).float()


def boosted(model: nn.Module, look: Callable[[], Any]) -> tuple[Tensor, str]:
    """Sigma [blocks] of 1, but :data:`BOOST` for the block that puts the largest vector into the model's main stream.

    Candidates are matrices whose modules narrow: more inputs than outputs, as the output projection of an MLP does, and
    not the embedding or the head. Of these the one whose output has the largest norm at any one token of a batch: in
    many language models the second or third of its kind, known for massive activations.

    Args:
        look: runs the model on a batch.

    Raises:
        ValueError: no module narrows.
    """
    blocks = Blocks.of(model)
    largest: dict[str, float] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and inputs[0].shape[-1] > output.shape[-1]:
            norm = float(output.detach().float().norm(dim=-1).max())
            largest[name] = max(norm, largest.get(name, 0.0))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in _matrices(model, blocks)]
    try:
        with torch.no_grad():
            look()
    finally:
        for handle in handles:
            handle.remove()
    if not largest:
        raise ValueError("no matrix of the model narrows its input: there is no block to boost")
    chosen = max(largest, key=lambda name: largest[name])
    return torch.tensor([BOOST if name == chosen else 1.0 for name in blocks.names]), chosen


def _matrices(model: nn.Module, blocks: Blocks) -> list[tuple[str, nn.Module]]:
    """Modules that own a matrix among the blocks as their weight, by the block's name."""
    named: dict[int, Block] = {id(block.tensor): block for block in blocks if block.tensor.ndim == 2}
    owners = [(named.get(id(getattr(module, "weight", None))), module) for module in model.modules()]
    return [(block.name, module) for block, module in owners if block is not None and not block.embedding]


CONTROL_SEED = 1
"""Seed of everything drawn for a control; tuners are mostly made with seed 0."""
PUBLISHED_SPREAD = 0.75
"""Coefficient of variation of the published tuners' sigma: for a tuner whose own sigma is the same everywhere."""

Found: TypeAlias = Entry | str
"""A control, or why there is none."""


@dataclass(frozen=True)
class Controls:
    """The controls of a setting."""

    entries: Sequence[Entry]
    left_out: Mapping[str, str]
    """Control -> why there is none here."""


@dataclass(frozen=True)
class _Making:
    """What controls are made from."""

    config: MetaEvaluateConfig
    prepared: Prepared
    judged: Contender
    folder: Path

    @property
    def tuner(self) -> Tuner:
        return self.prepared.tuners[self.judged.label]

    @property
    def tasks(self) -> list[str]:
        return self.prepared.setting.tasks

    def contender(self, role: str) -> Contender | None:
        """The baseline of a role."""
        return next((found for found in self.config.contenders if found.role == role), None)

    def entry(self, name: str, method: Contender, tuners: Mapping[str, Tuner | None]) -> Entry:
        """An entry with the tuner's step control, by task."""
        paths = {task: None if tuner is None else str(freeze(tuner, self.folder)) for task, tuner in tuners.items()}
        return Entry(CONTROLS[name], CONTROL, method.method, paths, method.method_args, self.judged.options)

    def learned(self, name: str, tuner: Tuner) -> Entry:
        """The tuner's contender with another tuner."""
        return self.entry(name, self.judged, dict.fromkeys(self.tasks, tuner))

    def table(self, name: str, sigma: Tensor, **about: object) -> Tuner:
        """A tuner that says ``sigma`` of the trainable blocks, whatever it sees."""
        model = self.prepared.model
        given = dict(zip(Blocks.of(model).names, sigma.tolist(), strict=True))
        every = [given.get(block, 1.0) for block in Blocks.of(model, trainable=False).names]
        provenance = Provenance(self.tuner.provenance.base_model, recipe={"control": name, **about})
        return Tuner.for_model(model, "table", 0, self.tuner.normalizer, provenance, values=every)


def build_controls(config: MetaEvaluateConfig, prepared: Prepared, folder: Path) -> Controls:
    """Make the controls of a setting and save their tuners below ``folder``.

    Raises:
        ValueError: the gradients agree nowhere, or no block can be boosted.
        FloatingPointError: a loss is not finite.
    """
    making = _Making(config, prepared, config.judged_contender, folder)
    found = {name: MAKERS[name](making) for name in config.controls}
    return Controls(
        [entry for entry in found.values() if isinstance(entry, Entry)],
        {name: entry for name, entry in found.items() if isinstance(entry, str)},
    )


def _step_control(name: str, role: str) -> Callable[[_Making], Found]:
    def make(making: _Making) -> Found:
        baseline = making.contender(role)
        if baseline is None:
            return f"there is no {role}"
        if baseline.options == making.judged.options:
            return "the tuner's step control is the baseline's own: the same runs"
        return making.entry(name, baseline, dict.fromkeys(making.tasks))

    return make


def _schedule(making: _Making) -> Found:
    """MeZO at the best of all schedules and learning rates: three times the tries of any other."""
    baseline = making.contender(BASELINE_MEZO)
    assert baseline is not None, "the configuration has refused that"
    entry = making.entry("mezo_schedule", baseline, dict.fromkeys(making.tasks))
    return replace(entry, options=baseline.options, alternatives=[{"schedule": name} for name in get_args(Schedule)])


def _fresh_networks(making: _Making) -> Found:
    """The tuner's architecture, features and basis with weights freshly drawn; for a mere table, the published networks."""
    tuner, args = making.tuner, {}
    architecture = tuner.architecture if _can_be_drawn(tuner) else "per_block_mlp"
    if architecture == tuner.architecture:
        args = {name: value for name, value in tuner.architecture_args.items() if name not in ("blocks", "seed")}
    fresh = Tuner.for_model(
        making.prepared.model,
        architecture,
        CONTROL_SEED,
        tuner.normalizer,
        Provenance(tuner.provenance.base_model, recipe={"control": "fresh networks"}),
        tuner.feature_set if architecture == tuner.architecture else "paper",
        tuner.basis,
        None,
        **args | {"start": "random"},
    )
    return making.learned("fresh_networks", fresh)


def _can_be_drawn(tuner: Tuner) -> bool:
    """Whether the architecture is a network that can start at random; a table has nothing to draw but sigma itself."""
    return tuner.architecture != "table" and "start" in inspect.signature(type(tuner.network)).parameters


def _random_sigma(making: _Making) -> Found:
    """One draw from a log-normal whose spread over the blocks is that of the tuner's sigma before the first step."""
    model, blocks = making.prepared.model, Blocks.of(making.prepared.model)
    cv = spread_of(making.tuner, blocks) or PUBLISHED_SPREAD
    drawn = Tuner.for_model(model, "table", CONTROL_SEED, start="random", cv=cv)
    with torch.no_grad():
        sigma = drawn.sigma(drawn.features(RunStatistics.start(blocks)), blocks.names)
    return making.learned("random_sigma", making.table("fixed random sigma", sigma, cv=cv, seed=CONTROL_SEED))


def spread_of(tuner: Tuner, blocks: Blocks) -> float:
    """Coefficient of variation over the blocks of a tuner's sigma before the first step."""
    with torch.no_grad():
        sigma = tuner.sigma(tuner.features(RunStatistics.start(blocks)), blocks.names)
    return float(sigma.std(unbiased=False) / sigma.mean())


def _outlier_boost(making: _Making) -> Found:
    feeder, model = _feeder(making, making.tasks[0]), making.prepared.model
    batch = feeder.at(0)
    sigma, name = boosted(model, lambda: batch_loss(model, batch, feeder.form))
    return making.learned("outlier_boost", making.table("outlier boost", sigma, block=name))


def _static_table(making: _Making) -> Found:
    agreements = [_agreement(making, task) for task in making.prepared.pool]
    sigma = sigma_from(agreements, Blocks.of(making.prepared.model))
    table = making.table("gradients of the pool", sigma, tasks=list(making.prepared.pool))
    return making.learned("static_table", table)


def _oracle_table(making: _Making) -> Found:
    """Cheats: gradients of the very task, though not of the seeds' batches."""
    blocks = Blocks.of(making.prepared.model)
    sigmas = {task: sigma_from([_agreement(making, task)], blocks) for task in making.tasks}
    tables = {task: making.table("gradients of the task", sigma, tasks=[task]) for task, sigma in sigmas.items()}
    return making.entry("oracle_table", making.judged, tables)


def _agreement(making: _Making, task: str) -> Tensor:
    return task_agreement(making.prepared.model, _feeder(making, task), making.config.control_batches)


def _feeder(making: _Making, name: str) -> Batcher:
    """Batches of a task's train rows, of the tuning seed."""
    config, prepared, task = making.config, making.prepared, get_task(name)
    options = shared_options(config, prepared.setting)
    splits = load_splits(task, options["data_dir"], config.train_size, config.dev_size, 0, config.tuning_seed)
    limit = context_length(prepared.model, prepared.setting.max_length)
    reader = encoder_for(prepared.model)
    encoded = reader.encode(task, splits.train, prepared.tokenizer, limit)
    size = prepared.setting.batch_size
    pad_id, grouping = reader.pad_id(prepared.tokenizer), Grouping.of(prepared.model, None)
    return Batcher(encoded, task.form, pad_id, size, config.tuning_seed, prepared.model.device, grouping)


def _random_basis(making: _Making) -> Found:
    """The tuner with random columns of the same ranks in place of its basis."""
    tuner = making.tuner
    if not tuner.basis:
        return "the tuner has no basis"
    blocks = Blocks.of(making.prepared.model)
    return making.learned("random_basis", tuner.with_basis(random_basis(blocks, ranks(tuner.basis), CONTROL_SEED)))


def _random_turns(making: _Making) -> Found:
    """The tuner with its blocks dealt at random into as many groups of the same sizes."""
    tuner = making.tuner
    if tuner.block_schedule is None:
        return "the tuner takes no turns"
    return making.learned("random_turns", tuner.with_block_schedule(tuner.block_schedule.shuffled(CONTROL_SEED)))


MAKERS: Mapping[str, Callable[[_Making], Found]] = {
    "mezo_step_control": _step_control("mezo_step_control", BASELINE_MEZO),
    "dizo_step_control": _step_control("dizo_step_control", BASELINE_DIZO),
    "mezo_schedule": _schedule,
    "fresh_networks": _fresh_networks,
    "random_sigma": _random_sigma,
    "outlier_boost": _outlier_boost,
    "static_table": _static_table,
    "oracle_table": _oracle_table,
    "random_basis": _random_basis,
    "random_turns": _random_turns,
}
