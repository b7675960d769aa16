"""Meta-training from a configuration to a tuner: everything is checked before anything is written."""

from __future__ import annotations

import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.aliases import renamed
from l2l.estimators.finite_difference import finite_loss
from l2l.meta.bases import pool_basis
from l2l.meta.config import MetaTrainConfig, task_list
from l2l.meta.module import MetaLearner, MetaParts
from l2l.meta.normalizer import check_normaliser, make_normaliser
from l2l.meta.pool import PoolTask, check_weights, load_pool
from l2l.models.load import EMBEDDED, context_length, freeze_matching, load_model, load_tokenizer, model_identity, thaw
from l2l.params.blocks import Blocks
from l2l.params.functional import HALF
from l2l.report.console import print_table, progress_bar, quiet_lightning
from l2l.report.files import read_tensors, write_tensors
from l2l.report.plots import plot_panels, smooth
from l2l.report.run_directory import METRICS, MetricsLog, RunDirectory, read_metrics
from l2l.tasks import get_task
from l2l.tasks.losses import batch_loss
from l2l.tasks.tiny_world import POOL, VALIDATION
from l2l.tuners.api import Tuner
from l2l.tuners.diagnostics import movement
from l2l.tuners.features import feature_set
from l2l.tuners.model import Provenance, load_weights
from l2l.tuners.normalize import Normalizer, build_normalizer, normalizer_config
from l2l.tuners.schedule import BlockSchedule
from l2l.tuners.transfer import identified

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURED = "measured.pt"
"""What was measured on the pool before the first step, while the run is not finished: a run that goes on measures nothing
again, so that it is the same run to the last bit wherever it goes on."""


def meta_train(
    model: PreTrainedModel | str = "l2l/tiny",
    tasks: list[str] | str | None = None,
    out: str = "runs/meta-train",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Tuner:
    """Learn a tuner for a model over a pool of tasks; gives the best one by validation, saved in ``out``.

    Args:
        model: a transformers causal language model, or what :func:`l2l.load_model` takes. A model given as an object
            has its initial weights again afterwards.
        tasks: names of the pool's tasks.
        tokenizer: of a model given as an object; None loads it from where the model came from.
        options: fields of :class:`MetaTrainConfig`, e.g. ``steps=1000, lr=1e-6``.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: a loss is not finite.
    """
    name = model if isinstance(model, str) else model_identity(model).id or type(model).__name__
    options = renamed(options, {field.name for field in fields(MetaTrainConfig)})
    config = MetaTrainConfig(model=name, tasks=tasks or [], out=out, **options)
    return run_meta_training(config, None if isinstance(model, str) else model, tokenizer)


def run_meta_training(
    config: MetaTrainConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tuner:
    """See :func:`meta_train`."""
    config = with_defaults(config)
    folder = RunDirectory(config.out, _settings(config), config.overwrite)
    measured = folder.path / MEASURED
    known = folder.resumed and measured.exists()
    parts = prepare_meta_training(config, model, tokenizer, measured if known else None)
    learner = MetaLearner(parts, config, folder.create())
    began = time.perf_counter()
    learner.begin(folder.resumed)
    if not known:
        _keep(parts.tuner, measured)
    try:
        _train(learner, folder)
    finally:
        learner.restart()  # the model was only lent
        thaw(parts.frozen)
    return _finish(learner, folder, time.perf_counter() - began)


def with_defaults(config: MetaTrainConfig) -> MetaTrainConfig:
    """The configuration with its pool spelled out.

    Raises:
        ValueError: no pool, an unknown task, features or normaliser, or a validation task inside the pool.
    """
    tasks, validation = task_list(config.tasks), task_list(config.validation_tasks)
    check_normaliser(config)
    feature_set(config.features)
    if not tasks and config.model != EMBEDDED:
        raise ValueError("tasks is empty: name the pool's tasks, e.g. --tasks rte,boolq,copa")
    if not tasks:
        tasks, validation = list(POOL), validation or list(VALIDATION)
    both = sorted(set(tasks) & set(validation))
    if both:
        raise ValueError(f"task {both[0]!r} is in the pool and in validation_tasks: a tuner is judged on other tasks")
    if config.task_weights and len(check_weights(config.task_weights)) != len(tasks):
        raise ValueError(
            f"task_weights has {len(config.task_weights)} values for {len(tasks)} tasks: give one for each"
        )
    for name in (*tasks, *validation):
        get_task(name)  # unknown ones show before anything is loaded
    return replace(config, tasks=tasks, validation_tasks=validation)


def prepare_meta_training(
    config: MetaTrainConfig,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    measured: Path | None = None,
) -> MetaParts:
    """Load model and pool, read one loss per task, make a fresh tuner. Nothing is written.

    Args:
        measured: where the run that goes on keeps its basis and its normaliser. None: they are found on the pool.
    """
    if model is None:
        model = load_model(config.model, config.dtype, config.device, config.revision)
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config._name_or_path or config.model, config.revision)
    model.eval()
    frozen = freeze_matching(model, config.freeze)
    half = next((block for block in Blocks.of(model) if block.tensor.dtype in HALF), None)
    if half is not None:
        raise ValueError(
            f"block {half.name!r} is {half.tensor.dtype}, but meta-training differentiates and steps back, which needs "
            "float32: load the model with dtype float32 (the tuner then serves half precision as well)"
        )
    limit = context_length(model, config.max_length)
    pool = load_pool(task_list(config.tasks), config, model, tokenizer, limit)
    validation = load_pool(task_list(config.validation_tasks), config, model, tokenizer, limit)
    for task in [*pool, *validation]:
        _read_first_loss(model, task)
    identity = model_identity(model)
    basis, normalizer = _measure(config, model, pool) if measured is None else _kept(measured)
    tuner = Tuner.for_model(
        model,
        config.architecture,
        config.seed,
        normalizer,
        Provenance(_known_as(model), identity.revision, recipe=_recipe(config)),
        config.features,
        basis,
        BlockSchedule.by_role(Blocks.of(model, trainable=False)) if config.block_schedule == "role" else None,
        **config.architecture_args,
    )
    return MetaParts(model, tokenizer, identified(tuner, model), pool, validation, frozen)


def _known_as(model: PreTrainedModel) -> str:
    """What to call the model in the tuner: its hub id, or the name of its directory, which may lie elsewhere for others."""
    found = model_identity(model).id or type(model).__name__
    return Path(found).resolve().name if found != EMBEDDED and Path(found).is_dir() else found


def _measure(
    config: MetaTrainConfig, model: PreTrainedModel, pool: list[PoolTask]
) -> tuple[dict[str, Tensor], Normalizer]:
    """Basis, empty where none is wanted, and normaliser."""
    basis = {}
    if config.basis != "none":
        basis = pool_basis(model, pool, config.basis, config.basis_rank, config.seed, trajectory=config.travels())
    return basis, make_normaliser(config, model, pool, basis)


def _keep(tuner: Tuner, path: Path) -> None:
    write_tensors(path, {"basis": tuner.basis or {}, "normaliser": normalizer_config(tuner.normalizer)})


def _kept(path: Path) -> tuple[dict[str, Tensor], Normalizer]:
    found = read_tensors(path)
    return found["basis"], build_normalizer(**found["normaliser"])


def _read_first_loss(model: PreTrainedModel, pool: PoolTask) -> None:
    batch = pool.feeder.at(0)
    try:
        finite_loss(lambda: batch_loss(model, batch, pool.feeder.form))
    except FloatingPointError as error:
        raise FloatingPointError(f"task {pool.task.name!r}, step 0, before any update: {error}") from error


def _settings(config: MetaTrainConfig) -> dict[str, Any]:
    """The configuration as plain values. Without a basis, turns or frozen parameters nothing is said of them, so that runs
    begun before there were any can go on."""
    settings = asdict(config)
    if config.basis == "none":
        del settings["basis"], settings["basis_rank"]
    if config.block_schedule == "none":
        del settings["block_schedule"]
    if config.freeze is None:
        del settings["freeze"]
    return settings


def _recipe(config: MetaTrainConfig) -> dict[str, Any]:
    """The part of the configuration that says how a tuner was made, not where."""
    private = ("out", "data_dir", "overwrite", "progress", "device")
    absent = [
        *(["block_schedule"] if config.block_schedule == "none" else []),
        *(["freeze"] if config.freeze is None else []),
    ]
    return {name: value for name, value in asdict(config).items() if name not in (*private, *absent)}


def _train(learner: MetaLearner, folder: RunDirectory) -> None:
    import lightning

    from l2l.meta.module import COLUMNS, MetaModule, WholeFiles
    from l2l.train.trainer import fit

    config = learner.config
    done = read_tensors(folder.checkpoint)["global_step"] if folder.resumed else 0
    metrics = MetricsLog(folder.path, COLUMNS, done - 1 if folder.resumed else None)
    try:
        with quiet_lightning(), progress_bar("meta-train", config.steps, done, config.progress) as advance:
            trainer = lightning.Trainer(
                max_steps=config.steps,
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[WholeFiles()],
                accelerator="cpu",
                devices=1,
            )
            module = MetaModule(learner, lambda: metrics, advance)
            fit(trainer, module, ckpt_path=str(folder.checkpoint) if folder.resumed else None, weights_only=True)
    finally:
        metrics.close()


def _finish(learner: MetaLearner, folder: RunDirectory, seconds: float) -> Tuner:
    tuner, judgement = learner.parts.tuner, learner.judgement
    results: dict[str, Any] = {"validated": bool(judgement.history), "best_step": learner.config.steps}
    if judgement.history:
        load_weights(tuner, judgement.best_weights)
        results |= {
            "best_step": judgement.best_step,
            "validation_loss": judgement.best_loss,
            "validation_loss_mezo": judgement.mezo,
            "initial_validation_loss": judgement.history[0][1],
        }
    tuner.provenance = replace(tuner.provenance, results=results)
    tuner.save_pretrained(folder.path)
    moved = movement(tuner)
    draw_curves(folder.path, task_list(learner.config.tasks))
    folder.finish(
        {
            **results,
            "validations": judgement.history,
            "movement": {"median": sorted(moved)[len(moved) // 2], "largest": max(moved)},
            "seconds": round(seconds, 2),
            "steps": learner.config.steps,
            "blocks": len(moved),
            "config": asdict(learner.config),
        }
    )
    for name in ("initial.pt", "theta.pt", MEASURED):  # last: until the run is finished it can be continued
        (folder.path / name).unlink(missing_ok=True)
    return tuner


def draw_curves(folder: Path, tasks: list[str]) -> Path:
    """``meta.png`` from ``metrics.csv``: losses along the trajectory per task, and validation."""
    rows = read_metrics(folder / METRICS)
    trained = [row for row in rows if row["train_loss"]]
    per_task = {
        name: smooth([(float(r["step"]), float(r["train_loss"])) for r in trained if float(r["task"]) == index], 5)
        for index, name in enumerate(tasks)
    }
    validation = [(float(row["step"]), float(row["validation_loss"])) for row in rows if row["validation_loss"]]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"loss along the trajectory": per_task}
    if validation:
        panels["validation"] = {"after short runs": validation}
    return plot_panels(folder / "meta.png", panels, "outer step", "loss (nats)")


def meta_train_command(config: MetaTrainConfig) -> None:
    """Learn a tuner, and print its results."""
    print_table(f"tuner: {config.out}", [run_meta_training(config).provenance.results])
