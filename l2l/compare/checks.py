"""What is refused before an evaluation begins: tasks that tuners have seen, tuners that do not fit, data that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.compare.config import Contender, MetaEvaluateConfig, Setting
from l2l.compare.protocol import majority_share
from l2l.compare.trials import located, shared_options
from l2l.finetune.config import FineTuneConfig
from l2l.finetune.methods import build_method
from l2l.models.load import EMBEDDED, context_length, load_model, load_tokenizer
from l2l.tasks import get_task
from l2l.tasks.rows import load_splits
from l2l.tasks.tiny_world import POOL, VALIDATION
from l2l.tuners.tuner import Tuner

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
