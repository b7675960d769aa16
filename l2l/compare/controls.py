"""What a tuner must beat to have learned something: contenders modelled on it, without what it learned.

Each takes over the tuner's step control, method arguments and normaliser, so that only sigma, the basis or the turns differ.
Controls of sigma move all blocks at every step: turns are learned. Tables of sigma are tuners like any other, on disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, get_args

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.compare.checks import Prepared
from l2l.compare.config import BASELINE, BASELINE_DIZO, CONTROL, CONTROLS, Contender, MetaEvaluateConfig
from l2l.compare.entries import Entry, freeze
from l2l.compare.sigma_tables import boosted, sigma_from, task_agreement
from l2l.compare.trials import shared_options
from l2l.finetune.batches import Feeder
from l2l.finetune.control import Schedule
from l2l.models.buckets import Grouping
from l2l.models.load import context_length
from l2l.tasks import get_task
from l2l.tasks.encode import encoder_for
from l2l.tasks.losses import batch_loss
from l2l.tasks.rows import load_splits
from l2l.tuners.basis import random_basis, ranks
from l2l.tuners.history import History
from l2l.tuners.tuner import Provenance, Tuner

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
        return Tuner.for_model(model, "table", 0, self.tuner.normaliser, provenance, values=every)


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
    baseline = making.contender(BASELINE)
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
        tuner.normaliser,
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
        sigma = drawn.sigma(drawn.features(History.start(blocks)), blocks.names)
    return making.learned("random_sigma", making.table("fixed random sigma", sigma, cv=cv, seed=CONTROL_SEED))


def spread_of(tuner: Tuner, blocks: Blocks) -> float:
    """Coefficient of variation over the blocks of a tuner's sigma before the first step."""
    with torch.no_grad():
        sigma = tuner.sigma(tuner.features(History.start(blocks)), blocks.names)
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


def _feeder(making: _Making, name: str) -> Feeder:
    """Batches of a task's train rows, of the tuning seed."""
    config, prepared, task = making.config, making.prepared, get_task(name)
    options = shared_options(config, prepared.setting)
    splits = load_splits(task, options["data_dir"], config.train_size, config.dev_size, 0, config.tuning_seed)
    limit = context_length(prepared.model, prepared.setting.max_length)
    encoder = encoder_for(prepared.model)
    encoded = encoder.encode(task, splits.train, prepared.tokenizer, limit)
    size = prepared.setting.batch_size
    pad_id, grouping = encoder.pad_id(prepared.tokenizer), Grouping.of(prepared.model, None)
    return Feeder(encoded, task.form, pad_id, size, config.tuning_seed, prepared.model.device, grouping)


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
    if tuner.turns is None:
        return "the tuner takes no turns"
    return making.learned("random_turns", tuner.with_turns(tuner.turns.dealt(CONTROL_SEED)))


MAKERS: Mapping[str, Callable[[_Making], Found]] = {
    "mezo_step_control": _step_control("mezo_step_control", BASELINE),
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
