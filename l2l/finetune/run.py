"""Fine-tuning from a configuration to a directory: everything is checked before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.estimate.loaded import Expectation, expect
from l2l.estimators.base import read_loss
from l2l.finetune.adapt import adapted, fitting_tuner, save_trained, warn_of_steps
from l2l.finetune.baselines import baseline_names, build_baseline
from l2l.finetune.baselines.measure import measure
from l2l.finetune.batches import Feeder
from l2l.finetune.closures import choose_closures
from l2l.finetune.config import FineTuneConfig
from l2l.finetune.defaults import resolve
from l2l.finetune.ground import load_ground
from l2l.finetune.methods import MethodLike, build_method, method_name
from l2l.finetune.optimizer import ZOOptimizer
from l2l.finetune.session import Parts, Session
from l2l.models.buckets import Grouping
from l2l.models.heads import compile_decoder
from l2l.models.load import context_length, model_identity
from l2l.report.memory import PeakMemory
from l2l.report.metrics import read
from l2l.report.plots import plot_panels, smooth
from l2l.report.progress import progress_bar
from l2l.report.rundir import METRICS, RunDirectory
from l2l.tasks.encode import collate, encoder_for
from l2l.tuners.tuner import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLED = 32
"""Batches looked at to predict what a run needs."""
EVALUATED = 32
"""Examples per forward pass of an evaluation."""
WORTH_MEASURING = 50
"""Steps from which on a run's time is predicted: measuring the machine takes as long as a few steps."""


@dataclass(frozen=True)
class FineTuneResult:
    """What a run ends with."""

    model: PreTrainedModel
    """The model, with the weights of the best step by dev loss."""
    summary: dict[str, Any]
    """What ``summary.json`` holds."""
    out: Path


def fine_tune(
    model: PreTrainedModel | str = "l2l/tiny",
    task: str = "world_topic",
    method: MethodLike = "mezo",
    tuner: Tuner | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> FineTuneResult:
    """Fine-tune a model on a task with forward passes only.

    Args:
        model: a transformers language model of any kind (see :mod:`l2l.models.kinds`), or what :func:`l2l.load_model`
            takes. A model given is trained in place.
        task: name of a task.
        method: ``"mezo"``, ``"dizo"``, ``"learned"``, a method object, or ``l2l.MeZO`` and the like.
        tuner: for the learned method: a tuner, or what :meth:`Tuner.from_pretrained` takes.
        tokenizer: of a model given as an object; None loads it from where the model came from.
        options: fields of :class:`FineTuneConfig`, e.g. ``steps=2000, lr=1e-6, out="runs/sst2"``.

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: the loss is not finite.
    """
    config = FineTuneConfig(
        model=model if isinstance(model, str) else model_identity(model).id or type(model).__name__,
        task=task,
        method=method_name(method),
        tuner=tuner.provenance.base_model if isinstance(tuner, Tuner) else tuner,
        **options,
    )
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    return start(config, folder, None if isinstance(model, str) else model, tokenizer, method, tuner)


def start(
    config: FineTuneConfig,
    folder: RunDirectory,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
) -> FineTuneResult:
    """Prepare a run and run it, or measure a baseline that takes no steps (:mod:`l2l.finetune.baselines`).

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: the loss is not finite.
    """
    if config.method not in baseline_names():
        return run(prepare(config, model, tokenizer, method, tuner), config, folder)
    baseline = build_baseline(config.method, config.method_args, tuner or config.tuner)
    ground = load_ground(config, model, tokenizer)
    return FineTuneResult(ground.model, measure(baseline, ground, config, folder), folder.path)


def prepare(
    config: FineTuneConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
) -> Parts:
    """Load model, data and method, and read one loss: what can be wrong shows here. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: bad input, named.
        FloatingPointError: the loss of the first batch is not finite.
    """
    ground = load_ground(config, model, tokenizer)
    tokenizer, task, splits = ground.tokenizer, ground.task, ground.splits
    model = adapted(ground.model, config)
    model.eval()  # two looks at one batch must not differ by dropout
    named = fitting_tuner(tuner or config.tuner, model, config.scheme, config.match, config.progress)
    lr, epsilon = resolve(config.scheme, config.lr, config.epsilon)
    built = build_method(method or config.method, epsilon, config.method_args, named, model, config.steps)
    warn_of_steps(model, config, built)
    optimizer = ZOOptimizer(
        model,
        built,
        lr,
        config.seed,
        config.weight_decay,
        walk=config.walk,
        update=config.update,
        control=config.control(),
        sparse_embeddings=config.sparse_embeddings,
    )
    _check_forward(config, model, optimizer)
    limit = context_length(model, config.max_length)
    encoder = encoder_for(model)
    encoded = encoder.encode(task, splits.train, tokenizer, limit)
    grouping = Grouping.of(model, config.length_groups, config.share_prompts)
    feeder = Feeder(
        encoded, task.form, encoder.pad_id(tokenizer), config.batch_size, config.seed, model.device, grouping
    )
    if config.compile:
        compile_decoder(model)
    closures = choose_closures(config, built, model, tokenizer, task, splits.train, feeder)
    parts = Parts(model, tokenizer, task, splits, feeder, optimizer, closures)
    _read_first_loss(parts)
    return parts


def _check_forward(config: FineTuneConfig, model: PreTrainedModel, optimizer: ZOOptimizer) -> None:
    """Refuse what would only show in the first step."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.sparse_embeddings and head is not None and head.weight is embedding.weight:
        raise ValueError(
            "sparse_embeddings=True, but the embedding is tied to the head, whose logits read every row: leave it off"
        )
    if config.compile and (config.sparse_embeddings or optimizer.theta.walk == "exact"):
        raise ValueError(
            "compile=True needs weights that are walked in place: a compiled forward cannot be given transient copies. "
            "Leave compile off, or use float32 with walk='in_place' and sparse_embeddings off"
        )


def _read_first_loss(parts: Parts) -> None:
    try:
        read_loss(parts.closures.at(0))
    except FloatingPointError as error:
        raise FloatingPointError(f"step 0, before any update: {error}") from error


def run(parts: Parts, config: FineTuneConfig, folder: RunDirectory) -> FineTuneResult:
    """Train, evaluate and write. An interrupted run continues from its checkpoint and ends with the same weights."""
    expected = _expected(parts, config)
    if config.progress:
        print(expected.line(config.steps))
    session = Session(parts, config, folder.create())
    try:
        with PeakMemory(parts.model.device) as peak:
            session.begin()
            _loop(session, config)
    finally:
        session.close()
    return _finish(session, config, folder, expected, peak.bytes)


def _loop(session: Session, config: FineTuneConfig) -> None:
    label = f"{config.task} {config.method}"
    with progress_bar(label, config.steps, session.progress.step, config.progress) as advance:
        if config.loop == "lightning":
            from l2l.finetune.module import run_lightning

            run_lightning(session, advance)
        else:
            from l2l.finetune.bare import run_bare

            run_bare(session, advance)


def _expected(parts: Parts, config: FineTuneConfig) -> Expectation:
    """What the run is going to need: told before it begins, and beside what was measured when it has ended."""
    feeder, theta = parts.feeder, parts.optimizer.theta
    longest = sorted(feeder.examples, key=lambda example: -max(len(option.ids) for option in example.options))
    whole = replace(feeder.grouping, groups=1)
    evaluated = collate(longest[:EVALUATED], "classification", feeder.pad_id, grouping=whole)
    batches = [feeder.at(step) for step in range(0, config.steps, max(1, config.steps // SAMPLED))]
    return expect(
        parts.model,
        parts.optimizer.blocks,
        theta.walk,
        theta.update == "master",
        parts.optimizer.method,
        batches,
        [evaluated],
        measure=config.steps >= WORTH_MEASURING,
        every=config.control_every if config.lr == "auto" else 0,
    )


def _finish(
    session: Session, config: FineTuneConfig, folder: RunDirectory, expected: Expectation, peak: int
) -> FineTuneResult:
    parts, done = session.parts, session.progress
    last = {"train": session.scores(session.train_sample).plain(), "test": session.scores(parts.splits.test).plain()}
    session.load_best()
    best = {
        "step": done.best_step,
        "dev": session.scores(parts.splits.dev).plain(),
        "test": session.scores(parts.splits.test).plain(),
    }
    summary = {
        "task": parts.task.label,
        "method": config.method,
        "scheme": config.scheme,
        "model": vars(model_identity(parts.model)),
        "lr": config.lr,
        "epsilon": config.epsilon,
        "seed": config.seed,
        "steps": done.step,
        "passes": done.passes,
        "seconds": round(done.seconds, 2),
        "estimate": {"peak_bytes": expected.peak_bytes, "seconds_per_step": expected.seconds_per_step},
        "measured": {"peak_bytes": peak, "seconds_per_step": done.seconds / max(done.step, 1)},
        "initial_loss": done.initial_train_loss,
        "final_loss": last["train"]["loss"],
        "accuracy": last["test"]["value"],
        "last": last,
        "best": best,
        "objective": {"name": config.objective, "best_dev": done.best_dev_loss},
        "rows": {name: len(getattr(parts.splits, name)) for name in ("train", "dev", "test")},
        "note": parts.splits.note,
        "blocks": len(parts.optimizer.blocks),
        "trained_parameters": parts.optimizer.blocks.numel,
        "walk": parts.optimizer.theta.walk,
        "update": parts.optimizer.theta.update,
        "dtype": str(parts.model.dtype).removeprefix("torch."),
        "config": asdict(config),
    }
    if config.save_model:
        _save_model(parts, config.scheme, folder.path / "model")
    draw_curves(folder.path, config.objective)
    folder.finish(summary)
    (folder.path / "best.pt").unlink()  # last: until the run is finished it can be continued
    return FineTuneResult(parts.model, summary, folder.path)


def _save_model(parts: Parts, scheme: str, target: Path) -> None:
    save_trained(parts.model, scheme, target)
    parts.tokenizer.save_pretrained(target)


def draw_curves(folder: Path, objective: str = "loss") -> Path:
    """``loss.png`` from ``metrics.csv``: what training minimised, smoothed, and the loss on dev."""
    rows = read(folder / METRICS)
    train = [(float(row["step"]), float(row["train_loss"])) for row in rows]
    dev = [(float(row["step"]), float(row["dev_loss"])) for row in rows if row["dev_loss"]]
    if objective == "loss":
        return plot_panels(folder / "loss.png", {"loss": {"train": smooth(train), "dev": dev}}, "step", "loss (nats)")
    panels = {objective: {"train": smooth(train)}, "loss (nats)": {"dev": dev}}
    return plot_panels(folder / "loss.png", panels, "step", "value")
