"""Checks before an experiment writes anything: every method is built on every model under every scheme, on its data.

What can be refused is refused here, in one line; a method that is refused on some models or schemes is left out of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.experiments.spec import Contender, Entry, ExperimentConfig, MethodCosts, Place, SchemeEntry, Setting, freeze
from l2l.methods import method_class
from l2l.methods.registry import build_method
from l2l.models.load import context_length
from l2l.optim import ZOOptimizer
from l2l.params.blocks import Blocks
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import load_run_inputs
from l2l.train.trainer import fitting_tuner, setup_scheme
from l2l.tuners.api import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_tuners(place: Place, folder: Path) -> Place:
    """The place with its tuners saved below a folder, as they are now."""
    entries = {}
    for label, entry in place.entries.items():
        saved = {task: str(freeze(tuner, folder)) for task, tuner in entry.tuners.items() if isinstance(tuner, Tuner)}
        entries[label] = replace(entry, tuners={**entry.tuners, **saved})
    return replace(place, entries=entries)


def check_all(config: ExperimentConfig, contenders: Sequence[Contender], held_out: bool = True) -> list[Place]:
    """Load every model and build every method on it under every scheme.

    Args:
        held_out: leave out a tuner in settings with a task that it has learned from.

    Raises:
        ValueError, FileNotFoundError: a model, task or data that cannot be had, an unknown method, or one that can take
            part nowhere; named.
    """
    for one in contenders:
        if re.fullmatch(r"[\w.]+", one.method):  # the parts of composed names (a+b) are checked where they are built
            method_class(one.method)
    places = [
        check_place(config, setting, scheme, contenders, held_out)
        for setting in config.settings
        for scheme in config.tuning_schemes
    ]
    for one in contenders:
        reasons = [place.left_out.get(one.label) for place in places]
        if all(reasons):
            raise ValueError(f"method {one.label!r} can take part nowhere: {reasons[0]}; mend it, or leave it out")
    return places


def check_place(
    config: ExperimentConfig, setting: Setting, scheme: SchemeEntry, contenders: Sequence[Contender], held_out: bool
) -> Place:
    """One place of :func:`check_all`."""
    options = config.run_options(setting, scheme)
    model = _load(setting, options)
    blocks = Blocks.of(model)
    entries: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for one in contenders:
        try:
            tuner = _load_tuner(setting, one, held_out)
            method = _build(config, setting, scheme, one, tuner, model)
        except ValueError as error:
            left_out[one.label] = " ".join(str(error).split())
            continue
        planned = has_horizon(method) and "max_passes" in options
        steps = ceil(options["max_passes"] / method.passes) if planned else None
        entries[one.label] = Entry(one, dict.fromkeys(setting.tasks, tuner), steps, MethodCosts.of(method, blocks))
    return Place(setting, scheme, entries, left_out)


def _load(setting: Setting, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model under the scheme; the rows of all tasks are read, so that missing or malformed data are refused here."""
    configs = [FineTuneConfig(**{**options, "task": task}) for task in setting.tasks]
    first = load_run_inputs(configs[0])
    for config in configs[1:]:
        load_run_inputs(config, first.model, first.tokenizer)
    context_length(first.model, setting.max_length)
    model = setup_scheme(first.model, configs[0])
    model.eval()
    return model


def _load_tuner(setting: Setting, contender: Contender, held_out: bool) -> Tuner | None:
    name = contender.tuner_for(setting.name)
    if name is None:
        return None
    tuner = Tuner.from_pretrained(name)
    learned = learned_tasks(tuner)
    for task in setting.tasks if held_out else ():
        if task in learned:
            raise ValueError(
                f"tuner {name!r} of contender {contender.label!r} has learned from task {task!r} of setting "
                f"{setting.name!r}: compare it on tasks that took no part in making it"
            )
    return tuner


def learned_tasks(tuner: Tuner) -> list[str]:
    """Tasks that a tuner's recipe names, to learn from or to choose by."""
    found: list[str] = []
    for name in ("tasks", "validation_tasks"):
        tasks = tuner.provenance.recipe.get(name) or []
        found += tasks.split(",") if isinstance(tasks, str) else tasks
    return [task.strip() for task in found]


def _build(
    config: ExperimentConfig,
    setting: Setting,
    scheme: SchemeEntry,
    contender: Contender,
    tuner: Tuner | None,
    model: PreTrainedModel,
) -> Any:
    """The method, built as a run would build it, and an optimizer at each of its points, so that both can refuse."""
    options = config.run_options(setting, scheme) | contender.options
    options |= {"method": contender.method, "method_args": contender.method_args}
    configs = [FineTuneConfig(**options | dict(point)) for point in config.points(setting, scheme, contender)]
    first, fitting = configs[0], fitting_tuner(tuner, model, scheme.name)
    assert first.epsilon is not None, "a configuration fills it in"
    method = build_method(contender.method, first.epsilon, contender.method_args, fitting, model, first.steps)
    for one in configs:
        assert one.lr is not None, "a configuration fills it in"
        ZOOptimizer(
            model,
            method,
            one.lr,
            weight_decay=one.weight_decay,
            perturb=one.perturb,
            update=one.update,
            curvature_lr=one.curvature_lr(),
            sparse_embeddings=one.sparse_embeddings,
        )
    return method


def has_horizon(method: Any) -> bool:
    """Whether the method, or one that it wraps, plans for a number of steps."""
    inner = getattr(method, "inner", None)
    return getattr(method, "horizon", None) is not None or (inner is not None and has_horizon(inner))
