"""Meta-training from a configuration to a tuner: everything is checked before anything is written."""

import time
from contextlib import closing, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.aliases import renamed
from l2l.arguments import plain
from l2l.estimators import finite_loss
from l2l.meta.bases import pool_basis
from l2l.meta.config import INITIAL, MEASURED, THETA, MetaTrainConfig, task_list, with_defaults
from l2l.meta.curvature import pool_traces
from l2l.meta.pool import MetaInputs, load_pool
from l2l.meta.population import OUTER_STEP, Population
from l2l.meta.state import PopulationObjective
from l2l.models.load import EMBEDDED, context_length, freeze_matching, load_model, load_tokenizer, model_identity, thaw
from l2l.models.prefix import train_only
from l2l.params import Blocks
from l2l.params.functional import HALF
from l2l.report.console import plot_panels, print_table, smooth
from l2l.report.run_directory import METRICS, RunDirectory, read_metrics, read_tensors
from l2l.train.inputs import NAMES, examples_fingerprint, model_fingerprint, rows_fingerprint, source_digest
from l2l.tuners.api import Tuner
from l2l.tuners.diagnostics import movement
from l2l.tuners.model import Provenance, load_weights
from l2l.tuners.normalize import CurvatureNormalizer, EnergyNormalizer, build_normalizer, normalizer_config
from l2l.tuners.schedule import BlockSchedule
from l2l.tuners.transfer import identified

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from l2l.meta.module import MetaTraining

NOT_IN_RECIPE = ("out", "data_dir", "overwrite", "progress", "device", "processes", "executor", "ray_address")
"""Fields that say where a tuner was made, not how."""
_FILES = 2
"""Beside the checkpoints, files of a run that are as large as the weights that are trained."""


def meta_train(
    model: "PreTrainedModel | str" = "l2l/tiny",
    tasks: list[str] | str | None = None,
    out: str = "runs/meta-train",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **options: Any,
) -> Tuner:
    """Learn a tuner for a model over a pool of tasks; gives the best one by validation, saved in ``out``.

    Args:
        model: a transformers causal language model, or an argument of :func:`l2l.load_model`. A model given as an object
            has its initial weights back afterwards.
        tasks: names of the pool's tasks.
        tokenizer: of a model given as an object; None loads it from where the model came from.
        options: fields of :class:`MetaTrainConfig`, e.g. ``steps=1000, lr=1e-6``.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: a loss is not finite.
    """
    model = plain(model)
    name = model if isinstance(model, str) else model_identity(model).id or type(model).__name__
    options = renamed(options, {field.name for field in fields(MetaTrainConfig)})
    config = MetaTrainConfig(model=name, tasks=[] if tasks is None else tasks, out=out, **options)
    return run_meta_training(config, None if isinstance(model, str) else model, tokenizer)


def run_meta_training(
    config: MetaTrainConfig, model: "PreTrainedModel | None" = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Tuner:
    """See :func:`meta_train`."""
    from l2l.meta.module import MetaTraining, train  # importing l2l must not import lightning

    config = with_defaults(config)
    unused = ("basis", "basis_rank") if config.basis == "none" else ()
    objective, population = config.make_objective(), None
    if config.shared and isinstance(objective, PopulationObjective):
        for what, value in (("model", model), ("tokenizer", tokenizer)):
            if value is not None:
                raise ValueError(
                    f"{what} is an object, and other processes load theirs by name: give its name or directory, or leave "
                    "processes and executor out"
                )
        population = Population(config, objective.members)
    # No outer step depends on how many there will be.
    free, passing = {*NAMES, "steps"}, (INITIAL, THETA, MEASURED, OUTER_STEP)
    with RunDirectory(config.out, _settings(config, *unused), config.overwrite, free, passing=passing) as folder:
        if folder.resumed and (done := folder.read_checkpoint()[1]["global_step"]) > config.steps:
            raise ValueError(f"the run in {config.out} has taken {done} steps, and steps={config.steps}: give a larger number")
        known = folder.resumed and folder.is_whole(MEASURED, "basis and normalizer are measured anew")
        inputs = prepare_meta_training(config, model, tokenizer, folder.path / MEASURED if known else None)
        folder.identify(inputs_fingerprint(inputs, config))
        weights = sum(block.tensor.nbytes for block in Blocks.of(inputs.model))
        rehearse_end(inputs.tuner, weights, folder, _FILES + config.shared)
        module = MetaTraining(inputs, config, folder.create(), population)
        began = time.perf_counter()
        if not (folder.resumed and folder.is_whole(INITIAL, "it is written anew, from the weights that the model has")):
            folder.write(INITIAL, module.weights())
        if not known:
            tuner = inputs.tuner
            folder.write(MEASURED, {"basis": tuner.basis or {}, "normaliser": normalizer_config(tuner.normalizer)})
        try:
            with nullcontext() if population is None else closing(population):
                if population is not None:
                    population.begin(folder)
                train(module)
        finally:
            module.restart()  # the caller's model gets its initial weights back
            thaw(inputs.frozen)
        return _finish(module, folder, time.perf_counter() - began)


def inputs_fingerprint(inputs: MetaInputs, config: MetaTrainConfig) -> dict[str, Any]:
    """What the run reads: of every task the train rows, encoded, and the dev rows, rendered; model, tokenizer, objective."""
    found = model_fingerprint(inputs.model, inputs.tokenizer)
    for kind, tasks in (("task", inputs.pool), ("validation task", inputs.validation)):
        for place, one in enumerate(tasks):
            rows = {"train rows": examples_fingerprint(one.batcher.examples), "dev rows": rows_fingerprint(one.task, one.dev)}
            found[f"{kind} {place}"] = {"label": one.task.label, **rows}
    named = {"objective": config.objective, "architecture": config.architecture}
    return found | {f"{name} source": source_digest(value) for name, value in named.items() if "." in value}


def prepare_meta_training(
    config: MetaTrainConfig, model: Any, tokenizer: "PreTrainedTokenizerBase | None", measured: Path | None = None
) -> MetaInputs:
    """Load model and pool, evaluate one loss per task, make a fresh tuner. Nothing is written. ``measured``: file with the
    basis and normalizer of a run that is resumed; None: they are measured on the pool."""
    if model is None:
        model = load_model(config.model, config.dtype, config.device, config.revision)
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config._name_or_path or config.model, config.revision)
    model.eval()
    frozen = train_only(model, config.train_layers)
    frozen += freeze_matching(model, config.freeze)
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
        try:
            finite_loss(task.loss(model, task.batcher.at(0)))
        except FloatingPointError as error:
            raise FloatingPointError(f"task {task.task.name!r}, step 0, before any update: {error}") from error
    if measured is not None:
        known = read_tensors(measured)
        basis, normalizer = known["basis"], build_normalizer(**known["normaliser"])
    else:
        rank = config.basis_rank
        basis = {} if config.basis == "none" else pool_basis(model, pool, config.basis, rank, config.seed, config=config)
        if config.normalizer == EnergyNormalizer.name:
            normalizer = EnergyNormalizer(config.embedding_rows_per_sample, config.batch_size, config.normalise)
        elif config.normalizer == CurvatureNormalizer.name:
            normalizer = CurvatureNormalizer(*pool_traces(model, pool, config.seed, basis=basis))
        else:
            normalizer = build_normalizer(config.normalizer)
    identity = model_identity(model)
    name = identity.id or type(model).__name__
    if name != EMBEDDED and Path(name).exists():
        name = Path(name).resolve().name  # what lies elsewhere for others
    provenance = Provenance(name, identity.revision, recipe=_settings(config, *NOT_IN_RECIPE))
    schedule = BlockSchedule.by_role(Blocks.of(model, trainable=False)) if config.block_schedule == "role" else None
    made_of = config.architecture, config.seed, normalizer, provenance, config.features, basis, schedule
    tuner = Tuner.for_model(model, *made_of, **config.architecture_args)
    return MetaInputs(model, tokenizer, identified(tuner, model), pool, validation, frozen)


def rehearse_end(tuner: Tuner, weights: int, folder: RunDirectory, files: int = _FILES) -> None:
    """Try before the first step what the run does in the end: save the tuner, and load it.

    Args:
        weights: bytes of what is trained of the model; a checkpoint holds as much, and once more the velocity.
        files: how many other files hold as much.

    Raises:
        ValueError: the tuner cannot be saved or loaded, or the directory not be written to; or its disk has no room.
    """
    with folder.trial(3 * 2 * weights + files * weights) as target:
        try:
            tuner.save_pretrained(target)
            Tuner.from_pretrained(str(target))
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the tuner could not be saved after training: {error}") from error


def _settings(config: MetaTrainConfig, *without: str) -> dict[str, Any]:
    """The configuration as plain values, without options that are off and came later, so that runs begun before can go on."""
    absent = [*without, *(["block_schedule"] if config.block_schedule == "none" else [])]
    absent += ["freeze"] if config.freeze is None else []
    absent += ["train_layers"] if config.train_layers == "all" else []
    return {name: value for name, value in asdict(config).items() if name not in absent}


def _finish(module: "MetaTraining", folder: RunDirectory, seconds: float) -> Tuner:
    """Save the best tuner, or the last where none was validated, with results, picture and summary."""
    config, tuner, found = module.config, module.inputs.tuner, module.validations
    results: dict[str, Any] = {"validated": bool(found.history), "best_step": config.steps}
    if found.history:
        load_weights(tuner, found.best_weights)
        results |= {"best_step": found.best_step, "validation_loss": found.best_loss}
        results |= {"validation_loss_mezo": found.mezo, "initial_validation_loss": found.history[0][1]}
    tuner.provenance = replace(tuner.provenance, results=results)
    tuner.save_pretrained(folder.path)
    moved = movement(tuner)
    draw_curves(folder.path, task_list(config.tasks))
    movements = {"median": sorted(moved)[len(moved) // 2], "largest": max(moved)}
    summary = {**results, "validations": found.history, "movement": movements, "seconds": round(seconds, 2)}
    folder.finish(summary | {"steps": config.steps, "blocks": len(moved), "config": asdict(config)})
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
