"""Fine-tuning: load inputs, set up what is trained, run the steps, evaluate and save as due, write the results.

Bad input is refused before anything is written. One :class:`Session` does everything that belongs to a step; it is driven
by a plain loop, or by a Lightning trainer (``loop: lightning``) with the same results bit for bit.
"""

import hashlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from math import ceil, isfinite
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal, final
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader, IterableDataset

from l2l.aliases import renamed
from l2l.arguments import plain
from l2l.costs import EvaluationPlan, Expectation, evaluated_rows, expect
from l2l.estimators import finite_loss
from l2l.methods.base import FirstOrder
from l2l.methods.registry import (
    MethodLike,
    build_method,
    check_estimator,
    innermost,
    method_name,
    takes_tuner,
    with_estimator,
    with_top_blocks,
)
from l2l.models import Grouping, compile_decoder, saving
from l2l.models.load import context_length, freeze_matching, model_identity
from l2l.models.prefix import TrainLayers, train_only
from l2l.models.schemes import ADAPTERS, apply_scheme
from l2l.optim import ZOOptimizer, schedule_factor
from l2l.parallel.ranks import Ranks
from l2l.params.in_place import merges
from l2l.report import run_directory
from l2l.report.console import Bars, growing, plot_panels, print_table, quiet_lightning, smooth
from l2l.report.memory import PeakMemory, return_freed_memory
from l2l.report.run_directory import (
    METRICS,
    MetricsLog,
    RunDirectory,
    Stopped,
    StopRequest,
    read_metrics,
    stop_requests,
)
from l2l.tasks import Row, format_interval
from l2l.tasks.encode import collate, encoder_for
from l2l.tasks.evaluate import Scores, visits
from l2l.tasks.inspect import warn_of_problems
from l2l.train import several
from l2l.train.baselines import Baseline, baseline_names, build_baseline
from l2l.train.config import EVAL_EVERY, CompleteConfig, FineTuneConfig, doubts
from l2l.train.inputs import (
    NAMES,
    Batcher,
    Closures,
    RunInputs,
    fingerprint,
    load_run_inputs,
    make_closures,
    weights_digests,
)
from l2l.train.objectives import LOSS
from l2l.train.on_ray import RayLead, check_named
from l2l.train.prefix import FILE, RunPrefix, check_shared, prepare_prefix, share_step, trace_top
from l2l.train.rewards import (
    AFTER,
    BEFORE,
    REWARD,
    GivenReward,
    RewardFunction,
    RewardScores,
    reward_figures,
    write_completions,
)
from l2l.train.runlog import NAME, ROWS, RunLog, StepRecord, check_log, read_log, run_header
from l2l.tuners import Level, Tuner, compare
from l2l.tuners.plan import options_line

if TYPE_CHECKING:
    import lightning
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COLUMNS = ("train_loss", "projected_gradient", "lr", "curvature", "passes", "seconds", "dev_loss", "dev_metric", "bad_losses")
"""Of metrics.csv, beside the step. ``bad_losses``: steps so far that ``on_bad_loss`` skipped, clipped or rolled back."""
BEST = "best.safetensors"
"""The trained weights of the best step so far, by name, while the run is not finished."""
WEIGHTS = "weights.safetensors"
"""The same at the end of a run whose model could not be saved."""
SAMPLED = 32
"""Batches whose shapes predict a run's time and memory."""
EVALUATIONS = 4
"""On dev, at least so many within ``max_seconds``."""
FASTER = 2
"""Steps within ``max_seconds`` for which hidden states are computed before the first, over those predicted: a machine may
become less busy."""
EVALUATED = 32
"""Examples per forward pass of an evaluation."""
LIMITS = ("steps", "max_passes", "max_seconds")
"""Fields that end a run: one that is continued may end later, unless its steps depend on where it ends."""
WORTH_MEASURING = 50
"""Steps from which on a run's time is predicted: measuring the machine takes as long as a few steps."""


@dataclass(frozen=True)
class FineTuneResult:
    """The result of a run."""

    model: "PreTrainedModel"
    """The model, with the weights of the best step by dev loss."""
    summary: dict[str, Any]
    """The content of ``summary.json``."""
    out: Path


@dataclass(frozen=True)
class RunContext(RunInputs):
    """The inputs of a run that trains, with its optimizer and the closures of its steps."""

    optimizer: ZOOptimizer
    closures: Closures
    prefix: RunPrefix | None
    """The cache of hidden states below the lowest trained layer, not yet built."""


def fine_tune(
    model: "PreTrainedModel | str" = "l2l/tiny",
    task: str = "world_topic",
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    reward: RewardFunction | str | None = None,
    prompts: Sequence[Row] | Path | str | None = None,
    **options: Any,
) -> FineTuneResult:
    """Fine-tune a model on a task, or for a reward, with forward passes only.

    Args:
        model: a transformers language model of any kind (see :mod:`l2l.models.kinds`), or what :func:`l2l.load_model`
            takes. A model object is trained in place.
        task: name of a task.
        method: ``"mezo"``, ``"dizo"``, ``"learned"``, a method object, or ``l2l.MeZO`` and the like. None: that of the tuner's
            plan, else ``learned`` with a tuner and ``mezo`` without.
        tuner: a tuner, or what :meth:`Tuner.from_pretrained` takes. Its plan decides what ``options`` leave open.
        tokenizer: of a model given as an object; None loads it from where the model came from.
        reward: in place of a task, a function that scores completions, or its name; see :mod:`l2l.train.rewards`.
        prompts: of a reward: rows with a ``prompt`` and the function's further columns, or a file of them.
        options: fields of :class:`FineTuneConfig`, e.g. ``steps=2000, lr=1e-6, out="runs/sst2"``.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: the loss is not finite.
    """
    options = renamed(options, {field.name for field in fields(FineTuneConfig)})
    model, method, tuner = map(plain, (model, method, tuner))
    given, reward_name, prompts_name = GivenReward.of(reward, prompts)
    config = FineTuneConfig(
        model=model if isinstance(model, str) else model_identity(model).id or type(model).__name__,
        task=task,
        method=None if method is None else method_name(method),
        tuner=tuner.provenance.base_model if isinstance(tuner, Tuner) else tuner,
        reward=reward_name,
        prompts=prompts_name,
        **options,
    )
    return plan_and_run(config, None if isinstance(model, str) else model, tokenizer, method, tuner, given)


def plan_and_run(
    config: FineTuneConfig,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
    given: GivenReward | None = None,
) -> FineTuneResult:
    """Decide what the configuration leaves open, and run it, or continue such a run.

    Raises:
        ValueError, FileNotFoundError, FloatingPointError: as :func:`fine_tune`.
    """
    if config.executor == "ray":
        check_named(model=model, method=method, tuner=tuner, reward=given)
    tuner = _loaded(tuner or config.tuner)
    planned: dict[str, Any] = {}
    if tuner is not None and tuner.plan is not None and (planned := config.open_to(tuner.plan)):
        if "train_layers" in planned and len(tuner.plan.depths) > 1:
            layers, model, tokenizer = _layers_by_budget(config, planned, model, tokenizer, method, tuner, given)
            planned["train_layers"] = layers
        line = f"from the tuner's plan: {options_line(planned)}"
        print(line) if config.progress else logger.info("%s", line)
    ranks, complete = several.enlist(config.completed(planned))
    if ranks is not None and ranks.rank > 0:
        return _follow(complete, ranks, model, tokenizer, method, tuner, given)
    why: dict[str, str] = {}
    if complete.schedule != "constant":  # its factor is a function of the share of the run that is done
        why |= {name: f"which the schedule {complete.schedule} depends on" for name in LIMITS}
    free = {*NAMES, *LIMITS} - set(why)
    passing = (BEST, FILE, WEIGHTS, *([NAME] if config.save == "model" else []))
    with RunDirectory(config.out, asdict(complete), config.overwrite, free, why, passing=passing) as folder:
        if folder.resumed and config.progress:
            print(f"continuing the run in {config.out}")
        with nullcontext() if ranks is None else ranks.failing():
            return start_fine_tuning(complete, folder, model, tokenizer, method, tuner, ranks, given)


def _follow(
    config: CompleteConfig,
    ranks: Ranks,
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase | None",
    method: MethodLike | None,
    tuner: Tuner | str | None,
    given: GivenReward | None,
) -> FineTuneResult:
    """Take part in the run of rank 0. The result has its last weights, and an empty summary."""
    with ranks.failing():
        context = prepare_fine_tuning(config, model, tokenizer, method, tuner, given)
        with several.prefix_in_memory(context, f"rank {ranks.rank}"):
            several.follow(context, ranks)
    return FineTuneResult(context.model, {}, Path(config.out))


def _layers_by_budget(
    config: FineTuneConfig,
    planned: dict[str, Any],
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase | None",
    method: MethodLike | None,
    tuner: Tuner,
    given: GivenReward | None,
) -> "tuple[TrainLayers, PreTrainedModel | None, PreTrainedTokenizerBase | None]":
    """The layers that a tuner's plan trains at a run's budget, and model and tokenizer where these were loaded to find out.

    The budget is the least of ``max_passes``, of the passes of ``steps``, and of ``max_seconds`` over those of a pass, where
    passes run the whole model on a batch of the plan's size. A measured one is used once: a continued run keeps its layers.

    Raises:
        ValueError: as :func:`prepare_fine_tuning`; or the whole model is to be run, and would not be in memory.
    """
    plan = tuner.plan
    assert plan is not None, "the caller has seen it"
    recorded = None if config.overwrite or config.max_seconds is None else RunDirectory.recorded(config.out)
    if recorded is not None and recorded.get("train_layers") in [depth.train_layers for depth in plan.depths]:
        return recorded["train_layers"], model, tokenizer
    limits = [] if config.max_passes is None else [float(config.max_passes)]
    if config.steps is not None or config.max_seconds is not None:
        if config.stream_layers:
            raise ValueError(
                "the tuner's plan trains layers by budget, for which a pass of the whole model is run first, and stream_layers "
                "keeps that out of memory: set train_layers, or max_passes as the only limit"
            )
        whole = config.completed(planned | {"train_layers": "all"})
        whole = replace(whole, prefix_cache="off", compile=False, progress=False)
        context = prepare_fine_tuning(
            whole, model, tokenizer, method, tuner, given
        )  # has run a pass before the one to be timed
        model, tokenizer = context.model, context.tokenizer
        if config.steps is not None:
            limits.append(config.steps * context.optimizer.method.passes)
        if config.max_seconds is not None:
            limits.append(config.max_seconds / _pass_seconds(context))
    return plan.train_layers(min(limits) * (config.batch_size or plan.batch_size) / plan.batch_size), model, tokenizer


def _loaded(tuner: Tuner | str | None) -> Tuner | None:
    return Tuner.from_pretrained(tuner) if isinstance(tuner, str) else tuner


def start_fine_tuning(
    config: CompleteConfig,
    folder: RunDirectory,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
    ranks: Ranks | None = None,
    given: GivenReward | None = None,
) -> FineTuneResult:
    """Prepare a run and run it, with the other ranks where there are some, or measure a baseline that takes no steps
    (:mod:`l2l.train.baselines`).

    Raises:
        ValueError, FileNotFoundError, FloatingPointError: as :func:`fine_tune`.
    """
    if config.method not in baseline_names():
        return run_fine_tuning(prepare_fine_tuning(config, model, tokenizer, method, tuner, given), folder, ranks)
    baseline = build_baseline(config.method, config.method_args, tuner or config.tuner)
    return run_baseline(baseline, load_run_inputs(config, model, tokenizer, given), folder)


# Set-up: the scheme, the tuner, the method and its optimizer, the closures.


def prepare_fine_tuning(
    config: FineTuneConfig,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
    given: GivenReward | None = None,
) -> RunContext:
    """Load model, data and method, and compute one loss, so that errors show now. Nothing is written.

    Args:
        given: see :func:`load_run_inputs`.

    Raises:
        ValueError, FileNotFoundError: bad input, named.
        FloatingPointError: the loss of the first batch is not finite.
    """
    config = config.completed()
    check_estimator(method or config.method, config.estimator, config.num_directions)
    inputs = load_run_inputs(config, model, tokenizer, given)
    model = setup_scheme(inputs.model, config)
    model.eval()
    inputs = replace(inputs, model=model)
    tuner = _loaded(tuner or config.tuner)
    if tuner is not None and tuner.plan is not None and tuner.plan.method == config.method and not takes_tuner(config.method):
        tuner = None  # its plan does without its sigma
    bound = fitting_tuner(tuner, model, config.scheme, config.match, config.progress)
    told = method or config.method, config.epsilon, config.method_args, bound, model
    built = with_estimator(build_method(*told, config.steps), config.estimator, config.num_directions)
    if config.steps is None and config.max_passes is not None:  # a method that plans ahead plans for the passes
        steps = ceil(config.max_passes / built.passes)
        built = with_estimator(build_method(*told, steps), config.estimator, config.num_directions)
    trace = None
    if getattr(innermost(built), "top_directions", 0):
        trace, top_blocks = trace_top(model, config)
        built = with_top_blocks(built, top_blocks)
    if not isinstance(built, FirstOrder):
        # Learning rates of normalized steps are of another size, for which no range is known.
        lr = "auto" if built.step_is_normalized else config.lr
        for line in doubts(config.scheme, lr, built.epsilon, sum(p.numel() for p in model.parameters())):
            logger.warning("%s", line)
    modes = {name: getattr(config, name) for name in ("perturb", "update", "sparse_embeddings", "on_bad_loss")}
    controller = config.curvature_lr()
    optimizer = ZOOptimizer(model, built, config.lr, config.seed, config.weight_decay, curvature_lr=controller, **modes)
    # Options that would only fail in the first step are refused here.
    several.check_shareable(config, optimizer)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.sparse_embeddings and head is not None and head.weight is embedding.weight:
        raise ValueError(
            "sparse_embeddings=True, but the embedding is tied to the head, whose logits read every row: leave it off"
        )
    if config.compile and (config.sparse_embeddings or optimizer.theta.mode == "functional"):
        raise ValueError(
            "compile=True needs weights that are perturbed in place: a compiled forward cannot be given transient copies. "
            "Leave compile off, or use float32 with perturb='in_place' and sparse_embeddings off"
        )
    encoder, tokenizer = encoder_for(model), inputs.tokenizer
    if inputs.reward is None:
        encoded = encoder.encode(inputs.task, inputs.splits.train, tokenizer, context_length(model, config.max_length))
        grouping = Grouping.of(model, config.length_groups, config.share_prompts)
        warn_of_problems(inputs.task, inputs.splits, tokenizer, context_length(model, config.max_length), model)
    else:
        encoded, grouping = inputs.reward.examples(inputs.splits.train, config.max_new_tokens), Grouping()
    form, pad_id = inputs.task.form, encoder.pad_id(tokenizer)
    batcher = Batcher(encoded, form, pad_id, config.batch_size, config.seed, model.device, grouping)
    if config.compile:
        compile_decoder(model)
    closures = make_closures(inputs, built, batcher)
    if trace is not None:
        closures = share_step(closures, trace, optimizer.theta, innermost(built).top_blocks)
    loss = None
    try:
        if inputs.files is None:  # layers that are not in memory compute nothing yet
            loss = finite_loss(closures.at(0))
    except FloatingPointError as error:
        if config.on_bad_loss == "raise":
            raise FloatingPointError(f"step 0, before any update: {error}") from error
        logger.warning("step 0, before any update: %s", error)
    if trace is not None and loss is not None:
        check_shared(closures, loss, trace.dtype)
    prefix = None if inputs.reward is not None else prepare_prefix(inputs, closures, loss)
    return RunContext(**vars(inputs), optimizer=optimizer, closures=closures, prefix=prefix)


def setup_scheme(model: "PreTrainedModel", config: CompleteConfig) -> "PreTrainedModel":
    """The model in which exactly the weights that the scheme trains require gradients.

    Raises:
        ValueError: the scheme cannot be applied, or does not go with another field; or no weight is left to train.
    """
    if config.sparse_embeddings and (config.scheme != "full" or config.train_layers != "all"):
        what = f"scheme {config.scheme!r}" if config.scheme != "full" else f"train_layers={config.train_layers!r}"
        raise ValueError(f"sparse_embeddings=True, but {what} trains no word embedding: leave it off")
    if config.scheme in ("prefix", "prompt") and config.compile:
        raise ValueError(f"compile=True does not go with scheme {config.scheme!r}: leave it off")
    found = apply_scheme(model, config.scheme, config.scheme_args, config.seed)
    train_only(found, config.train_layers)
    freeze_matching(found, config.freeze)
    return found


def fitting_tuner(
    tuner: Tuner | str | None, model: "PreTrainedModel", scheme: str, match: Level = "exact", verbose: bool = False
) -> Tuner | None:
    """The tuner bound to the blocks that the scheme trains.

    A tuner of one model has an entry for each block of that model, by name. Adapters are blocks for which it has none;
    with ``kind`` they take the sigma of similar blocks. A size-free tuner serves them at every level.

    Args:
        match: how alike the model must be to the tuner's own; see :func:`l2l.tuners.transfer.matched`.
        verbose: print how the model differs from the tuner's own, if it does.

    Raises:
        ValueError: the model is less like the tuner's than ``match`` asks.
    """
    found = _loaded(tuner)
    if found is None:
        return None
    try:
        bound = found.matched(model, match)
    except ValueError as error:
        if scheme == "full" or match == "kind":
            raise
        raise ValueError(
            f"the tuner for {found.provenance.base_model!r} has a sigma for each block of the full model and none for those "
            f"that scheme {scheme!r} trains: use scheme full, or a size-free tuner (l2l meta-train, architecture shared_mlp), "
            "or give them the sigma of similar blocks with --match kind"
        ) from error
    if verbose and not found.size_free and (relation := compare(found, model)).kind != "exact":
        print(f"tuner for {found.provenance.base_model!r} on this model ({relation.kind}): {relation.message}")
    return bound


# The run.


def run_fine_tuning(context: RunContext, folder: RunDirectory, ranks: Ranks | None = None) -> FineTuneResult:
    """Train, evaluate and write; with ``ranks``, lead their steps. An interrupted run continues from its checkpoint and ends
    with the same weights."""
    config, device = context.config, context.model.device
    lead = None if ranks is None else several.lead_of(ranks, config, device)
    if config.executor == "ray":
        lead = RayLead(config, device)
    with nullcontext() if context.prefix is None else context.prefix.cache.attached():
        return _run(context, folder, lead)


def identify(context: RunContext, folder: RunDirectory) -> dict[str, Any]:
    """Record what the run reads, or compare it with what it read before; a model that a run of this process was training in
    this directory counts as the one that it was. Gives the header of the run log.

    Raises:
        ValueError: the run is continued and would read something else, or has gone past the end that it is given now; or no
            checkpoint, or log up to it, is whole.
    """
    began, out = _BEGAN.setdefault(context.model, {}), str(folder.path.resolve())
    read = None if context.files is None else context.files.tensor
    weights = weights_digests(context.model, [block.tensor for block in context.optimizer.blocks], read)
    found = fingerprint(context, context.closures.batcher.examples, context.optimizer.method, weights)
    if folder.resumed and out in began:
        found["model"]["weights"] = began[out]
    folder.identify(found)
    header = run_header(context.config, context.optimizer, context.model, weights) | {"run": folder.run}
    if folder.resumed:
        folder.read_checkpoint(lambda state: check_log(folder.path, header, state["progress"]["step"]))
        progress, before = Progress(**folder.read_checkpoint()[1]["progress"]), RunDirectory.recorded(folder.path) or {}
        for name, done in zip(LIMITS, (progress.step, progress.passes, progress.seconds), strict=True):
            limit, first = getattr(context.config, name), before.get(name)
            if limit is not None and limit != first and done > limit:
                given = "" if first is None else f", as the {first:g} that it began with"
                raise ValueError(
                    f"the run in {folder.path} has gone past {name}={limit:g}, to {done:g}: give a larger {name}{given}, or "
                    "choose another --out"
                )
    began[out] = found["model"]["weights"]
    return header


_BEGAN: "WeakKeyDictionary[PreTrainedModel, dict[str, str]]" = WeakKeyDictionary()
"""Model -> directory -> digest of its weights when the run in that directory began."""


def _run(context: RunContext, folder: RunDirectory, lead: several.Lead | None) -> FineTuneResult:
    header = identify(context, folder)
    rehearse_end(context, folder)
    config, expected, prefix = context.config, _expected_costs(context), context.prefix
    if config.progress:
        print(expected.line(config.steps, config.max_passes, config.max_seconds))
    context, plan = plan_evaluations(context, expected, folder)
    session = Session(context, plan, folder.create(), header, lead)
    with session.bars, closing(session):
        with PeakMemory(context.model.device) as peak:
            if prefix is not None:
                steps = plan.steps if config.max_seconds is None else FASTER * plan.steps
                prefix.build(context, context.closures, steps, folder, session.bars)
            session.begin()
            with stop_requests() as session.asked, session.training() as advance, context.optimizer.theta.fused_steps():
                if config.loop == "lightning":
                    _run_lightning(session, advance)
                else:
                    while not session.ended:
                        advance(session.step(context.optimizer))
            if session.asked.number is not None:
                raise stopped(f"after step {session.progress.step}", folder, session.asked.number)
        together = None if lead is None else lead.end(session.progress.step - session.began)
        done, optimizer = session.progress, context.optimizer
        last = session.score("train"), session.score("test")
        optimizer.theta.assign(folder.read(BEST))
        last_is_best = done.best_step == done.step - 1
        best = session.score("dev"), last[1] if last_is_best else session.score("test")
        session.log.end(done.best_step + 1)
        if config.save != "log":
            size = sum(tensor.nbytes for tensor in context.model.parameters())
            with session.bars.phase("save", size, 0.0) as advance, growing(folder.path / "model", advance):
                try:
                    save_run_model(context, folder.path / "model")
                except Exception as error:  # whatever transformers, peft or the disk raise
                    raise keep_weights(session, error) from error
    figures = {"scheme": config.scheme, "lr": config.lr, "epsilon": config.epsilon, "steps": done.step, "passes": done.passes}
    figures |= {"evaluate_seconds": round(done.evaluate_seconds, 2)}
    figures |= {
        "estimate": {"peak_bytes": expected.peak_bytes, "seconds_per_step": expected.seconds_per_step},
        "measured": {"peak_bytes": peak.bytes, "seconds_per_step": done.seconds / max(done.step, 1)},
        "initial_loss": done.initial_train_loss,
        "initial_dev_loss": done.initial_dev_loss,
        "objective": {"name": config.objective, "best_dev": done.best_dev_loss},
    }
    figures |= {"blocks": len(optimizer.blocks), "trained_parameters": optimizer.blocks.numel}
    figures |= {"perturb": optimizer.theta.mode, "update": optimizer.theta.update, "evaluations": vars(plan)}
    figures |= {"bad_losses": {"policy": config.on_bad_loss, **optimizer.bad_losses.counts}, "parallel": together}
    if prefix is not None:
        figures |= {"cache_seconds": round(prefix.seconds, 2), "prefix_cache": prefix.figures()}
    if isinstance(best[0], RewardScores):
        write_completions(folder.path / AFTER, best[0])
        figures |= {REWARD: reward_figures(folder.path, config.eval_samples)}
    summary = _summary(context, last, best, done.best_step, done.seconds, peak.bytes, figures)
    draw_curves(folder.path, config.objective)
    folder.finish(summary)
    return FineTuneResult(context.model, summary, folder.path)


def stopped(when: str, folder: RunDirectory, number: int) -> Stopped:
    """The exception of a run that has ended at a step's boundary, as it was asked to, with a checkpoint."""
    return Stopped(f"stopped {when}; a checkpoint is in {folder.path}, and the same command continues from it", number)


def save_run_model(context: RunContext, target: Path) -> None:
    """Save the model, or its adapter with the name of its base, and the tokenizer, readable as any new file."""
    saving.save_model(context.model, context.tokenizer, target, context.files)
    run_directory.share_as_usual(target)


def rehearse_end(context: RunContext, folder: RunDirectory) -> None:
    """Try before the first step what would otherwise fail after the last one; nothing of it is left.

    Raises:
        ValueError: the model could not be saved, or loaded again; the directory cannot be written to, or its disk has no room
            for checkpoints and model; or a row of the test split cannot be encoded.
    """
    config, weights = context.config, [block.tensor for block in context.optimizer.blocks]
    if context.reward is None:
        encode, limit = encoder_for(context.model).encode, context_length(context.model, config.max_length)
        encode(context.task, context.splits.test, context.tokenizer, limit)  # the others are evaluated before the first step
    best = sum(tensor.nbytes for tensor in weights)
    whole = config.scheme not in ADAPTERS
    model = sum(tensor.nbytes for tensor in (context.model.parameters() if whole else weights)) if config.save != "log" else 0
    state = best + run_directory.tensor_bytes(context.optimizer.state_dict())
    with folder.trial(3 * state + 2 * best + model) as target:  # of each file the one before stays until the next is whole
        if config.save != "log":
            saving.rehearse(context.model, context.tokenizer, target)


def keep_weights(session: "Session", error: Exception) -> ValueError:
    """The error of a model that could not be saved at the end of its run, once its weights lie in a file of their own."""
    target = session.folder.path / WEIGHTS
    try:
        session.write_weights(WEIGHTS)
    except (OSError, TypeError):
        target = session.folder.path / BEST
    line = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"the model could not be saved ({line}); its trained weights are kept in {target} (safetensors.torch.load_file gives "
        "them by name), and the same command tries again"
    )


def plan_evaluations(context: RunContext, expected: Expectation, folder: RunDirectory) -> tuple[RunContext, EvaluationPlan]:
    """The run with the rows that its evaluations take; says in a line where these are fewer than the configuration allows.

    A run that is continued keeps the plan of its checkpoint: the steps that fit into ``max_seconds`` are a measurement.
    """
    config, splits = context.config, context.splits
    there = {"train": len(context.reported_train), "dev": len(splits.dev), "test": len(splits.test)}
    saved = folder.read_checkpoint()[1].get("plan") if folder.resumed else None
    plan = EvaluationPlan(**saved) if saved else _evaluation_plan(context, expected, there)
    if fewer := [kind for kind in ("test", "dev") if getattr(plan, kind) < there[kind]]:
        rows = " and ".join(f"{getattr(plan, kind):,} of {there[kind]:,} {kind} rows" for kind in fewer)
        options = " and ".join(f"{kind}_size" for kind in fewer)
        line = f"evaluating {rows}, so that evaluations take at most a third of the run; set {options} to evaluate more"
        print(line) if config.progress else logger.warning(line)
    splits = replace(splits, dev=splits.dev[: plan.dev], test=splits.test[: plan.test])
    return replace(context, splits=splits, reported=plan.train), plan


def _evaluation_plan(context: RunContext, expected: Expectation, there: Mapping[str, int]) -> EvaluationPlan:
    config, batcher = context.config, context.closures.batcher
    if config.max_seconds is not None:  # a pass on this machine as busy as it is, where the prediction is for an idle one
        seconds = expected.work_per_step * _pass_seconds(context)
        seconds += 0.0 if context.prefix is None else context.prefix.fill_seconds
        expected = replace(expected, seconds_per_step=max(expected.seconds_per_step or 0.0, seconds))
    steps = expected.steps(config.steps, config.max_passes, config.max_seconds)
    most = EVAL_EVERY if config.max_seconds is None else min(EVAL_EVERY, ceil(steps / EVALUATIONS))
    every = config.eval_every or most
    # Tokens per row: options of one token share their prompt; answers to be compared are generated as well.
    scored = mean(sum(map(len, {option.fed for option in example.options})) for example in batcher.examples)
    gold = mean(len(example.options[example.gold[0]].fed) for example in batcher.examples)
    row = scored
    if context.reward is not None:
        row *= config.eval_samples
    elif context.task.generates:
        row += gold + context.task.new_tokens(config.max_new_tokens)
    trained = gold if config.objective in (LOSS, REWARD) and batcher.form == "lm" else row
    trained *= steps * expected.work_per_step * config.batch_size
    asked = {kind for kind in there if (config.dev_size if kind == "dev" else config.test_size) is not None}
    times = {"train": 2, "dev": 2 + ceil(steps / every), "test": 2}
    parameters = sum(parameter.numel() for parameter in context.model.parameters())
    return EvaluationPlan(
        **evaluated_rows(there, asked, times, row, trained, parameters), every=every, steps=steps, training=trained / row
    )


def _pass_seconds(context: RunContext) -> float:
    """Of a forward pass on the first step's batch, at least the second one of the process."""
    if context.prefix is not None:
        return context.prefix.pass_seconds
    began = time.perf_counter()
    with suppress(FloatingPointError):  # of which on_bad_loss decides, in the step
        finite_loss(context.closures.at(0))
    return time.perf_counter() - began


def _expected_costs(context: RunContext) -> Expectation:
    """Predicted time and memory: printed before the run, and recorded beside what was measured."""
    config, batcher, optimizer = context.config, context.closures.batcher, context.optimizer
    longest = sorted(batcher.examples, key=lambda example: -max(len(option.ids) for option in example.options))
    whole = replace(batcher.grouping, groups=1)
    evaluated = collate(longest[:EVALUATED], "classification", batcher.pad_id, grouping=whole)
    steps = config.steps or SAMPLED
    batches = [batcher.at(step) for step in range(0, steps, max(1, steps // SAMPLED))]
    trained = context.model, optimizer.blocks, optimizer.theta.mode, optimizer.theta.update == "master", optimizer.method
    every = config.curvature_every if config.lr == "auto" else 0
    known = [limit for limit in (config.steps, config.max_passes) if limit is not None]
    measure = min(known, default=WORTH_MEASURING) >= WORTH_MEASURING
    kept = {} if context.prefix is None else context.prefix.costs()
    if context.reward is None:
        return expect(*trained, batches, [evaluated], measure=measure, every=every, **kept)
    found = expect(*trained, batches, [evaluated], measure=False)  # its time is that of passes without a cache
    return replace(found, seconds_per_step=found.work_per_step * _pass_seconds(context)) if measure else found


@dataclass
class Progress:
    """How far a run has come; saved with each checkpoint."""

    step: int = 0
    passes: int = 0
    seconds: float = 0.0
    """Of training and logging; evaluations and checkpoints not included."""
    evaluate_seconds: float = 0.0
    """Of evaluations, before, during and after training."""
    best_step: int = -1
    best_dev_loss: float = float("inf")
    """Where another objective than the loss is minimised, that objective on the dev rows."""
    initial_train_loss: float = float("nan")
    initial_dev_loss: float = float("nan")


@final
class Session:
    """Runs steps, evaluates, keeps the best weights, writes checkpoints, and resumes from one exactly."""

    def __init__(
        self,
        context: RunContext,
        plan: EvaluationPlan,
        folder: RunDirectory,
        header: dict[str, Any],
        lead: several.Lead | None = None,
    ) -> None:
        self.context, self.config, self.plan, self.folder = context, context.config, plan, folder
        self.progress = Progress()
        self.asked = StopRequest()
        """Whether a signal has asked the run to stop."""
        self.ended = False
        """Whether no further step is to be taken: the run is done, or was asked to stop and has saved."""
        self._peak_lr: list[float] = [group["lr"] for group in context.optimizer.param_groups]  # before the schedule
        state: dict[str, Any] = {}
        if folder.resumed:
            _, state = folder.read_checkpoint()
            self.progress = Progress(**state["progress"])
            self._check_best(header, state["weights"])
            context.optimizer.theta.assign(state["weights"])
            context.optimizer.load_state_dict(state["optimizer"])
            self.ended = self.done
        self._bad = context.optimizer.bad_losses.total
        after = self.progress.step - 1 if folder.resumed else None
        self._lead, self.began = lead, self.progress.step
        tell = () if lead is None else (lead.tell,)
        self.log = RunLog(folder.path, header, self.progress.step if folder.resumed else None, *tell)
        columns = COLUMNS if context.reward is None else (*COLUMNS, REWARD)
        self.metrics = MetricsLog(folder.path, columns, after, state.get("metrics"))
        self._rows: dict[int, bytes] = {}
        before = plan.before + min(1.0, self.share) * (plan.training + plan.during) if folder.resumed else 0.0
        self.bars = Bars(f"{self.config.task} {self.config.method}", plan.whole, before, self.config.progress)
        self._clock = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the steps, the passes or the seconds are used up."""
        return self.share >= 1

    @property
    def share(self) -> float:
        """Share of the run that is done, 0 to 1 and more: of its steps, passes or seconds, whichever is furthest."""
        config, now = self.config, self.progress
        limits = (now.step, config.steps), (now.passes, config.max_passes), (now.seconds, config.max_seconds)
        return max(spent / limit for spent, limit in limits if limit is not None)

    def begin(self) -> None:
        """Evaluate the untrained model, before the first step."""
        if self.progress.step == 0:
            scores = self.score("dev")
            self._keep_best(scores, -1)
            self.progress.initial_dev_loss = scores.loss
            self.progress.initial_train_loss = self.score("train").loss
            if isinstance(scores, RewardScores):
                write_completions(self.folder.path / BEFORE, scores)
                self.metrics.log(0, passes=0, seconds=0.0, **_dev_values(scores))
        self._clock = time.perf_counter()

    @contextmanager
    def training(self) -> Iterator[Callable[[float], None]]:
        """The bar of the steps; yields a function to call with each step's loss."""
        shown = min(1.0, self.share)
        with self.bars.phase("train", 1.0, self.plan.training, shown) as advance:

            def after(loss: float) -> None:
                nonlocal shown
                now, before, shown = self.progress, shown, min(1.0, self.share)
                advance(shown - before, f"step {now.step} loss {loss:.4f} {now.seconds / now.step:.2g} s/step")

            yield after

    def step(self, optimizer: Any) -> float:
        """Take one step, log it, evaluate and save as due. Returns the loss.

        Args:
            optimizer: the context's, or what a trainer wraps around it.
        """
        now, closures = self.progress, self.context.closures
        factor = schedule_factor(self.config.schedule, self.share, self.config.schedule_end)
        for group, lr in zip(self.context.optimizer.param_groups, self._peak_lr, strict=True):
            group["lr"] = lr * factor
        step, theta = now.step, self.context.optimizer.theta
        checksum = b"" if self._lead is None else self._lead.compared(self.context.optimizer)
        restored = step > 0 and theta.displacement.restored and theta.mode == "in_place"
        if self._lead is None:
            optimizer.step(closure=closures.at(step), fresh=lambda number: closures.further(step, number))
        else:
            self._lead.step(self.context.optimizer, closures, self._peak_lr[0] * factor, restored, checksum)
        report = self.context.optimizer.report
        assert report is not None, "a step leaves a report"
        now.step, now.passes = step + 1, now.passes + report.passes
        self._tick()
        values = {"train_loss": report.loss, "projected_gradient": report.projected_gradient, "lr": report.lr[0]}
        values |= {"passes": now.passes, "seconds": round(now.seconds, 3)}
        if report.curvature is not None:
            values["curvature"] = report.curvature
        if now.step % self.plan.every == 0 or self.done:
            scores = self.score("dev")
            values |= _dev_values(scores)
            self._keep_best(scores, step)
            self._clock = time.perf_counter()
        bad = self.context.optimizer.bad_losses
        if "dev_loss" in values or step % self.config.log_every == 0 or bad.total > self._bad:
            self.metrics.log(step, **values, bad_losses=bad.total)
        self._bad = bad.total
        restored = restored and (bool(report.dropped) or any(not merges(estimate.direction) for estimate in report.estimates))
        self.log.append(StepRecord.of(report, self._peak_lr[0] * factor, self._rows_hash(step), restored))
        self.ended = self.done or self.asked.number is not None  # asked from here on, it ends after the next step
        if now.step % self.config.checkpoint_every == 0 or self.ended:
            self._tick()
            self.log.flush()
            state = {"weights": self._weights(), "optimizer": self.context.optimizer.state_dict()}
            state |= {"progress": dict(vars(now)), "plan": dict(vars(self.plan)), "metrics": self.metrics.extent}
            self.folder.write_checkpoint(state)
            self._clock = time.perf_counter()
        return report.loss

    def _rows_hash(self, step: int) -> bytes:
        """Hash of a step's examples."""
        batcher = self.context.closures.batcher
        indices = batcher.indices(step)
        for i in indices:
            if i not in self._rows:
                self._rows[i] = hashlib.blake2b(repr(batcher.examples[i]).encode(), digest_size=16).digest()
        return hashlib.blake2b(b"".join(self._rows[i] for i in indices), digest_size=ROWS).digest()

    def _tick(self) -> None:
        """Count the time since the clock was last set as training time."""
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def score(self, kind: Literal["train", "dev", "test"]) -> Scores:
        """Loss and metric with the current, unperturbed weights."""
        context = self.context
        rows = context.reported_train if kind == "train" else getattr(context.splits, kind)
        count = visits(context.task, rows)
        prefix = context.prefix if kind == "train" else None
        with (
            self._evaluating(),
            nullcontext() if prefix is None else prefix.reported(),
            self.bars.phase(f"evaluate {kind}", count, len(rows) / count) as advance,
        ):
            context.optimizer.theta.restore()
            return context.score(rows, context.closures.batcher.grouping, advance=advance)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Count the time of the block as evaluation."""
        began = time.perf_counter()
        yield
        if self.context.files is not None:  # memory is to hold the top of the model, not what its build and evaluations freed
            return_freed_memory()
        self.progress.evaluate_seconds += time.perf_counter() - began

    def _keep_best(self, scores: Scores, step: int) -> None:
        """Save the weights if the minimised objective on dev, where ``scores`` were measured, is the lowest so far."""
        if self.config.objective == scores.metric:
            value = -scores.value
        else:
            with self._evaluating():
                objective = self.context.closures.value(self.context.splits.dev)
            value = scores.loss if objective is None else objective
        if value < self.progress.best_dev_loss:
            self.progress.best_dev_loss, self.progress.best_step = value, step
            self.write_weights(BEST)

    def write_weights(self, name: str) -> None:
        """Write the trained tensors by name, as a file of the run's directory."""
        self.folder.write(name, self._weights())

    def _check_best(self, header: Mapping[str, Any], last: Mapping[str, torch.Tensor]) -> None:
        """Where the best weights of a run that is continued are lost, rebuild them from its log; the model is as before the
        first step. Where that is impossible, begin anew to choose them, from the ``last`` ones."""
        from l2l.train.replay import replay  # which stands on this module

        now, path = self.progress, self.folder.path / NAME
        log = read_log(path, now.best_step + 1) if path.exists() else None
        if log is not None:
            lost = "first" in log.header or log.header["not_replayable"] or log.header["trained"] != header["trained"]
            log = None if lost else log
        anew = f"the best step is chosen anew, from step {now.step - 1} on"
        if self.folder.is_whole(BEST, anew if log is None else f"rebuilt from {NAME}"):
            return
        if log is None:
            self.folder.write(BEST, dict(last))
            now.best_step, now.best_dev_loss = now.step - 1, float("inf")
        else:
            replay(log, self.context.optimizer, now.best_step + 1, at_once=True)
            self.write_weights(BEST)

    def _weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name, unperturbed; they share memory with the model."""
        self.context.optimizer.theta.restore()
        return {block.name: block.tensor.detach() for block in self.context.optimizer.blocks}

    def close(self) -> None:
        """Close the logs."""
        self.metrics.close()
        self.log.close()


# The Lightning trainer around a session.


@final
class Steps(IterableDataset[int]):
    """Endless step numbers: batches are a function of the step, so the loader has no state to restore."""

    def __iter__(self) -> Iterator[int]:
        return count()


def _run_lightning(session: Session, advance: Callable[[float], None]) -> None:
    """Run a session's remaining steps under a Lightning trainer."""
    import lightning

    if session.ended:
        return

    @final
    class StepModule(lightning.LightningModule):
        """Manual optimisation with the zeroth-order optimizer as its real optimizer, so that ``global_step`` counts."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return session.context.optimizer

        def train_dataloader(self) -> DataLoader[int]:
            return DataLoader(Steps(), batch_size=None)

        def training_step(self, batch: int, batch_idx: int) -> None:
            advance(session.step(self.optimizers()))
            self.trainer.should_stop = session.ended

        def on_train_start(self) -> None:
            session.asked.install()

    with quiet_lightning():
        trainer = lightning.Trainer(
            max_steps=-1 if session.config.steps is None else session.config.steps - session.progress.step,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu" if session.context.model.device.type == "cpu" else "gpu",
            devices=1,
        )
        fit(trainer, StepModule())


def fit(trainer: "lightning.Trainer", module: "lightning.LightningModule", **options: Any) -> None:
    """``trainer.fit``, with an interrupt raised as KeyboardInterrupt.

    Lightning would end the process instead, and leave it deaf to further interrupts.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, **options)
    except SystemExit as leaving:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from leaving


# Results.


def _dev_values(scores: Scores) -> dict[str, float]:
    """Columns of metrics.csv that an evaluation on dev gives."""
    found = {"dev_loss": scores.loss, "dev_metric": scores.value}
    return found | ({REWARD: scores.value} if isinstance(scores, RewardScores) else {})


def run_baseline(baseline: Baseline, inputs: RunInputs, folder: RunDirectory) -> FineTuneResult:
    """Measure a baseline and write ``config.yaml``, ``metrics.csv`` and ``summary.json``, with the fields of any run.

    Raises:
        ValueError: the baseline does not apply to this task or model; nothing is written then.
    """
    config = inputs.config
    if config.objective != "loss":
        raise ValueError(f"method {config.method!r} trains nothing, so objective {config.objective!r} has no meaning")
    began = time.perf_counter()
    with PeakMemory(inputs.model.device) as peak:
        found = baseline.measure(inputs)
    seconds = time.perf_counter() - began
    folder.create()
    with closing(MetricsLog(folder.path, COLUMNS)) as log:
        values = {"train_loss": found.train.loss, "passes": found.passes, "seconds": round(seconds, 3)}
        log.log(0, **values, dev_loss=found.dev.loss, dev_metric=found.dev.value)
    figures = {"train_seconds": 0.0, "evaluate_seconds": round(seconds, 2), "passes": found.passes}
    figures |= {"initial_loss": found.initial.loss, "trained_parameters": found.trained}
    figures |= {"note": "; ".join(filter(None, (inputs.splits.note, found.note))), "baseline": found.details}
    last, best = (found.train, found.test), (found.dev, found.test)
    summary = _summary(inputs, last, best, -1, seconds, peak.bytes, figures)
    folder.finish(summary)
    return FineTuneResult(inputs.model, summary, folder.path)


def _summary(
    inputs: RunInputs,
    last: tuple[Scores, Scores],
    best: tuple[Scores, Scores],
    best_step: int,
    seconds: float,
    peak_bytes: int,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``summary.json``. ``figures`` replace the values of a run that takes no steps, and add to them.

    Args:
        last: scores on train and test with the last weights.
        best: scores on dev and test with the weights of ``best_step``.
    """
    config, splits, (train, test) = inputs.config, inputs.splits, last
    found = {"task": inputs.task.label, "method": config.method, "scheme": "none", "model": vars(model_identity(inputs.model))}
    found |= {"lr": None, "epsilon": None, "seed": config.seed, "steps": 0, "passes": 0}
    found |= dict.fromkeys(("seconds", "train_seconds"), round(seconds, 2)) | {"cache_seconds": 0.0}
    found |= {
        "estimate": {"peak_bytes": None, "seconds_per_step": None},
        "measured": {"peak_bytes": peak_bytes, "seconds_per_step": None},
        "initial_loss": None,
        "initial_dev_loss": None,
        "final_loss": train.loss,
        "dev_loss": best[0].loss,
        "accuracy": test.value,
        "last": {"train": train.plain(), "test": test.plain()},
        "best": {"step": best_step, "dev": best[0].plain(), "test": best[1].plain()},
        "objective": {"name": config.objective, "best_dev": best[0].loss},
        "rows": {name: len(getattr(splits, name)) for name in ("train", "dev", "test")},
        "note": splits.note,
    }
    found |= {"blocks": 0, "trained_parameters": 0, "perturb": None, "update": None, "evaluations": None}
    found |= {"cache_seconds": 0.0, "prefix_cache": None, "bad_losses": None, "parallel": None}
    return found | {"dtype": str(inputs.model.dtype).removeprefix("torch.")} | figures | {"config": asdict(config)}


def draw_curves(folder: Path, objective: str = "loss") -> Path:
    """Draw ``loss.png`` from ``metrics.csv``: the minimised objective on train, smoothed, and the loss on dev."""
    rows = read_metrics(folder / METRICS)
    losses = ((float(row["step"]), float(row["train_loss"])) for row in rows if row["train_loss"])
    train = [point for point in losses if isfinite(point[1])]  # those of steps without an update are in metrics.csv
    dev = [(float(row["step"]), float(row["dev_loss"])) for row in rows if row["dev_loss"]]
    if objective == REWARD:
        panel = {"train batches": smooth([(step, -loss) for step, loss in train]), "dev": [(step, -loss) for step, loss in dev]}
        return plot_panels(folder / "loss.png", {REWARD: panel}, "step", "mean reward")
    if objective == "loss":
        return plot_panels(folder / "loss.png", {"loss": {"train": smooth(train), "dev": dev}}, "step", "loss (nats)")
    panels = {objective: {"train": smooth(train)}, "loss (nats)": {"dev": dev}}
    return plot_panels(folder / "loss.png", panels, "step", "value")


def fine_tune_command(config: FineTuneConfig) -> None:
    """Run or continue what ``config`` says, and print the figures of the run."""
    result = plan_and_run(config)
    if not (summary := result.summary):  # of a rank that has followed
        return
    if summary["note"]:
        print(summary["note"])
    shown = ["task", "method", "lr", "steps", "passes", "initial_loss", "final_loss", "dev_loss"]
    shown += ["train_seconds", "evaluate_seconds"]
    best, test = summary["best"]["step"], summary["best"]["test"]
    figures = {"best step": best, f"test {test['metric']}": format_interval(test["value"], test["interval"])}
    if (bad := summary["bad_losses"]) and any(isinstance(count, int) and count for count in bad.values()):
        figures["bad losses"] = ", ".join(f"{name} {count}" for name, count in bad.items() if count)
    for name, one in summary.get(REWARD, {}).items():
        error = one["standard_error"]
        figures[f"reward, {name}"] = f"{one['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
    print_table(f"fine-tune: {result.out}", [{name: summary[name] for name in shown} | figures])
    if (together := summary.get("parallel")) is not None:
        rows = [
            {"rank": rank} | {name: round(value, 1) for name, value in own.items()} for rank, own in together["sent"].items()
        ]
        print_table("bytes sent", rows)
