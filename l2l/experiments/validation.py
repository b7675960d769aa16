"""What is refused before an evaluation begins: tasks that tuners have seen, tuners that do not fit, data that are missing.

What is refused or left out before a comparison begins: every method is made on every model under every scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.experiments.runner import Place, cell_options, located, shared_options
from l2l.experiments.spec import (
    CompareConfig,
    Contender,
    Entry,
    MetaEvaluateConfig,
    MethodEntry,
    SchemeEntry,
    Setting,
    contenders,
    freeze,
    points,
)
from l2l.experiments.stats import majority_share
from l2l.methods import method_class
from l2l.methods.registry import build_method
from l2l.models.load import EMBEDDED, context_length, load_model, load_tokenizer
from l2l.optim import ZOOptimizer
from l2l.params.blocks import Blocks
from l2l.tasks import get_task
from l2l.tasks.rows import load_splits
from l2l.tasks.tiny_world import POOL, VALIDATION
from l2l.train.config import FineTuneConfig
from l2l.train.inputs import load_run_inputs
from l2l.train.trainer import fitting_tuner, setup_scheme
from l2l.tuners.api import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A setting whose model, tuners and data are there and fit."""

    setting: Setting
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: tuple[str, ...]
    tuners: Mapping[str, Tuner]
    """Contender -> tuner."""
    majority: Mapping[str, float]
    """Task -> accuracy of the best constant answer on its test rows."""


def prepare(config: MetaEvaluateConfig, setting: Setting) -> Prepared:
    """Load a setting and check everything that can be checked before the first run. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: what is wrong, named.
    """
    pool, validation = learned_from(setting)
    _refuse_seen(setting, {"its pool": pool, "its validation tasks": validation})
    _check_pool(config, setting, pool)
    majority = {task: _majority(config, setting, task) for task in setting.tasks}
    model = load_model(located(setting.model, config.root))
    tokenizer = load_tokenizer(located(setting.model, config.root))
    context_length(model, setting.max_length)
    tuners = {}
    for contender in config.contenders:
        name = contender.tuner_for(setting.name)
        FineTuneConfig(**_plain_options(config, setting, contender))
        build_method(contender.method, 1e-3, contender.method_args, name, model)
        if name is not None:
            tuners[contender.label] = tuner = Tuner.from_pretrained(name)
            _refuse_seen(setting, {f"what tuner {name!r} was learned from": seen_by(tuner)})
    if config.judged_contender.label not in tuners:
        raise ValueError(f"contender {config.judged_contender.label!r} is to be judged, but names no tuner")
    return Prepared(setting, model, tokenizer, pool, tuners, majority)


def _check_pool(config: MetaEvaluateConfig, setting: Setting, pool: tuple[str, ...]) -> None:
    """The control that is made from the pool needs one, and its rows."""
    if "static_table" not in config.controls:
        return
    if not pool:
        raise ValueError(f"setting {setting.name!r} has no pool: the control 'static_table' needs one; or leave it out")
    for name in pool:
        data_dir = shared_options(config, setting)["data_dir"]
        load_splits(get_task(name), data_dir, config.train_size, config.dev_size, 0, config.tuning_seed)


def learned_from(setting: Setting) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Pool and validation tasks of a setting; where it names none and its model is the embedded one, the world's."""
    embedded = setting.model == EMBEDDED
    pool = tuple(setting.pool) or (POOL if embedded else ())
    return pool, tuple(setting.validation) or (VALIDATION if embedded else ())


def seen_by(tuner: Tuner) -> tuple[str, ...]:
    """Tasks that a tuner's recipe names, to learn from or to choose by."""
    found: list[str] = []
    for name in ("tasks", "validation_tasks"):
        tasks = tuner.provenance.recipe.get(name) or []
        found += tasks.split(",") if isinstance(tasks, str) else tasks
    return tuple(task.strip() for task in found)


def _refuse_seen(setting: Setting, seen: Mapping[str, tuple[str, ...]]) -> None:
    for where, tasks in seen.items():
        both = [task for task in setting.tasks if task in tasks]
        if both:
            raise ValueError(
                f"task {both[0]!r} of setting {setting.name!r} is in {where}: tuners are judged on tasks that took no "
                "part in making them"
            )


def _majority(config: MetaEvaluateConfig, setting: Setting, name: str) -> float:
    """Loads the rows, so that missing or malformed data show."""
    task, options = get_task(name), shared_options(config, setting)
    splits = load_splits(task, options["data_dir"], config.train_size, config.dev_size, config.test_size)
    if task.metric != "accuracy":
        return 0.0
    return majority_share([task.example(row).gold for row in splits.test])


def _plain_options(config: MetaEvaluateConfig, setting: Setting, contender: Contender) -> dict[str, Any]:
    """A contender's fields of a fine-tuning run, for their values to be checked."""
    found: dict[str, Any] = shared_options(config, setting) | contender.options
    for alternative in contender.alternatives:
        FineTuneConfig(**found | alternative)
    return found | {"out": str(Path(config.out) / "runs")}


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MethodFacts:
    """What a method says of itself where it was made."""

    memory: str = ""
    """What it keeps beside the weights, in its own words."""
    paper: str = ""
    kept_bytes: int | None = None
    """Most bytes of tensors that it keeps between steps; None where it does not say."""
    trained_bytes: int = 0
    """Bytes of the weights that are trained."""
    step_is_normalized: bool = False
    """Whether its learning rate is of another size than MeZO's."""


@dataclass(frozen=True)
class Checked:
    """A place whose model, data and tuners are there, before anything is written."""

    setting: Setting
    scheme: SchemeEntry
    entries: Mapping[str, MethodEntry]
    tuners: Mapping[str, Tuner]
    facts: Mapping[str, MethodFacts]
    steps: Mapping[str, int]
    """Steps that the passes allow, of methods that look at the share of the run that lies behind."""
    left_out: Mapping[str, str]

    def place(self, tuners: Path) -> Place:
        """The same with the tuners saved below a folder, as they are now."""
        found = {}
        for label, given in self.entries.items():
            directory = str(freeze(self.tuners[label], tuners)) if label in self.tuners else None
            entry = Entry.of(given.contender, directory, self.setting.tasks)
            ahead = {"steps": self.steps[label]} if label in self.steps else {}
            found[label] = (given, replace(entry, options=entry.options | ahead))
        return Place(self.setting, self.scheme, found, self.left_out)


def check_all(config: CompareConfig) -> list[Checked]:
    """Load every model and make every method on it under every scheme.

    A method that is refused in some combinations is left out of these, with the reason.

    Raises:
        ValueError, FileNotFoundError: a model, task or data that cannot be had, a method that takes part nowhere, or a
            tuner that has learned from a task of the comparison; named.
    """
    entries = contenders(config)
    for entry in entries:
        method_of(entry.method)
    found = [
        _check_place(config, setting, scheme, entries)
        for setting in config.settings
        for scheme in config.tuning_schemes
    ]
    for entry in entries:
        reasons = [place.left_out.get(entry.label) for place in found]
        if all(reasons):
            raise ValueError(f"method {entry.label!r} can take part nowhere: {reasons[0]}; mend it, or leave it out")
    return found


def method_of(name: str) -> None:
    """Refuse a name that no method goes by. Of composed names (``a+b``), those who compose them know the parts.

    Raises:
        ValueError: it is unknown.
    """
    if re.fullmatch(r"[\w.]+", name):
        method_class(name)


def _check_place(
    config: CompareConfig, setting: Setting, scheme: SchemeEntry, entries: Sequence[MethodEntry]
) -> Checked:
    options = cell_options(config, setting, scheme)
    model = _loaded(setting, options)
    kept: dict[str, MethodEntry] = {}
    tuners: dict[str, Tuner] = {}
    facts: dict[str, MethodFacts] = {}
    steps: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        try:
            tuner = _tuner(setting, entry, entry.contender.tuner_for(setting.name))
            made = _made(options, config, setting, scheme, entry, tuner, model)
        except ValueError as error:
            left_out[entry.label] = " ".join(str(error).split())
            continue
        facts[entry.label] = _facts(made, model)
        kept[entry.label] = entry
        if _looks_ahead(made):
            steps[entry.label] = ceil(options["max_passes"] / made.passes)
        if tuner is not None:
            tuners[entry.label] = tuner
    return Checked(setting, scheme, kept, tuners, facts, steps, left_out)


def _loaded(setting: Setting, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model under the scheme; the rows of all tasks are read, so that missing or malformed data show."""
    configs = [FineTuneConfig(**{**options, "task": task}) for task in setting.tasks]
    first = load_run_inputs(configs[0])
    for config in configs[1:]:
        load_run_inputs(config, first.model, first.tokenizer)
    context_length(first.model, setting.max_length)
    model = setup_scheme(first.model, configs[0])
    model.eval()
    return model


def _tuner(setting: Setting, entry: MethodEntry, name: str | None) -> Tuner | None:
    if name is None:
        return None
    tuner = Tuner.from_pretrained(name)
    both = [task for task in setting.tasks if task in seen_by(tuner)]
    if both:
        raise ValueError(
            f"tuner {name!r} of method {entry.label!r} has learned from task {both[0]!r} of setting {setting.name!r}: "
            "compare it on tasks that took no part in making it"
        )
    return tuner


def _made(
    options: Mapping[str, Any],
    config: CompareConfig,
    setting: Setting,
    scheme: SchemeEntry,
    entry: MethodEntry,
    tuner: Tuner | None,
    model: PreTrainedModel,
) -> Any:
    """The method, made as a run would make it: what it refuses shows here."""
    own = {**options, **entry.options, "method": entry.method, "method_args": entry.method_args}
    configs = [FineTuneConfig(**own | dict(point)) for point in points(config, setting, scheme, entry)]
    fitting = fitting_tuner(tuner, model, scheme.name)
    epsilon = configs[0].epsilon
    assert epsilon is not None, "a configuration fills it in"
    built = build_method(entry.method, epsilon, entry.method_args, fitting, model, configs[0].steps)
    for one in configs:
        assert one.lr is not None, "a configuration fills it in"
        ZOOptimizer(
            model,
            built,
            one.lr,
            weight_decay=one.weight_decay,
            perturb=one.perturb,
            update=one.update,
            curvature_lr=one.curvature_lr(),
            sparse_embeddings=one.sparse_embeddings,
        )
    return built


def _looks_ahead(made: Any) -> bool:
    """Whether the method, or one that it is put around, takes the number of steps into account."""
    inner = getattr(made, "inner", None)
    return getattr(made, "horizon", None) is not None or (inner is not None and _looks_ahead(inner))


def _facts(made: Any, model: PreTrainedModel) -> MethodFacts:
    blocks = Blocks.of(model)
    return MethodFacts(
        memory=made.info.memory,
        paper=made.info.paper,
        kept_bytes=made.state_bytes(blocks),
        trained_bytes=sum(block.tensor.nbytes for block in blocks),
        step_is_normalized=made.step_is_normalized,
    )
