"""Fine-tuning from a configuration to a directory: everything is checked before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2l.estimators.base import read_loss
from l2l.finetune.batches import Feeder
from l2l.finetune.config import FineTuneConfig
from l2l.finetune.methods import MethodLike, build_method, method_name
from l2l.finetune.optimizer import ZOOptimizer
from l2l.finetune.session import Parts, Session
from l2l.models.load import context_length, load_model, load_tokenizer, model_identity
from l2l.report.metrics import read
from l2l.report.plots import plot_panels, smooth
from l2l.report.progress import progress_bar
from l2l.report.rundir import METRICS, RunDirectory
from l2l.tasks import get_task
from l2l.tasks.encode import encode, padding_id
from l2l.tasks.rows import load_splits
from l2l.tuners.tuner import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        model: a transformers causal language model, or what :func:`l2l.load_model` takes. A model given is trained in place.
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
    parts = prepare(config, None if isinstance(model, str) else model, tokenizer, method, tuner)
    return run(parts, config, folder)


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
    task = get_task(config.task)
    splits = load_splits(task, config.data_dir, config.train_size, config.dev_size, config.test_size, config.seed)
    if model is None:
        model = load_model(config.model, config.dtype, config.device, config.revision)
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config._name_or_path or config.model, config.revision)
    model.eval()  # two looks at one batch must not differ by dropout
    built = build_method(method or config.method, config.epsilon, config.method_args, tuner or config.tuner, model)
    optimizer = ZOOptimizer(model, built, config.lr, config.seed, config.weight_decay)
    limit = context_length(model, config.max_length)
    encoded = encode(task, splits.train, tokenizer, limit)
    feeder = Feeder(encoded, task.form, padding_id(tokenizer), config.batch_size, config.seed, model.device)
    parts = Parts(model, tokenizer, task, splits, feeder, optimizer)
    _read_first_loss(parts)
    return parts


def _read_first_loss(parts: Parts) -> None:
    from l2l.tasks.closure import batch_loss

    batch = parts.feeder.at(0)
    try:
        read_loss(lambda: batch_loss(parts.model, batch, parts.feeder.form))
    except FloatingPointError as error:
        raise FloatingPointError(f"step 0, before any update: {error}") from error


def run(parts: Parts, config: FineTuneConfig, folder: RunDirectory) -> FineTuneResult:
    """Train, evaluate and write. An interrupted run continues from its checkpoint and ends with the same weights."""
    session = Session(parts, config, folder.create())
    label = f"{config.task} {config.method}"
    try:
        session.begin()
        with progress_bar(label, config.steps, session.progress.step, config.progress) as advance:
            if config.loop == "lightning":
                from l2l.finetune.module import run_lightning

                run_lightning(session, advance)
            else:
                from l2l.finetune.bare import run_bare

                run_bare(session, advance)
    finally:
        session.close()
    return _finish(session, config, folder)


def _finish(session: Session, config: FineTuneConfig, folder: RunDirectory) -> FineTuneResult:
    parts, done = session.parts, session.progress
    last = {"train": vars(session.scores(session.train_sample)), "test": vars(session.scores(parts.splits.test))}
    session.load_best()
    best = {
        "step": done.best_step,
        "dev": vars(session.scores(parts.splits.dev)),
        "test": vars(session.scores(parts.splits.test)),
    }
    summary = {
        "task": f"{parts.task.name}@{parts.task.version}",
        "method": config.method,
        "model": vars(model_identity(parts.model)),
        "lr": config.lr,
        "epsilon": config.epsilon,
        "seed": config.seed,
        "steps": done.step,
        "passes": done.passes,
        "seconds": round(done.seconds, 2),
        "initial_loss": done.initial_train_loss,
        "final_loss": last["train"]["loss"],
        "accuracy": last["test"]["value"],
        "last": last,
        "best": best,
        "rows": {name: len(getattr(parts.splits, name)) for name in ("train", "dev", "test")},
        "note": parts.splits.note,
        "blocks": len(parts.optimizer.blocks),
        "trained_parameters": parts.optimizer.blocks.numel,
        "walk": "in place, float32",
        "config": asdict(config),
    }
    if config.save_model:
        _save_model(parts, folder.path / "model")
    draw_curves(folder.path)
    folder.finish(summary)
    (folder.path / "best.pt").unlink()  # last: until the run is finished it can be continued
    return FineTuneResult(parts.model, summary, folder.path)


def _save_model(parts: Parts, target: Path) -> None:
    parts.model.save_pretrained(target)
    parts.tokenizer.save_pretrained(target)


def draw_curves(folder: Path) -> Path:
    """``loss.png`` from ``metrics.csv``: the losses seen in training, smoothed, and those on dev."""
    rows = read(folder / METRICS)
    train = [(float(row["step"]), float(row["train_loss"])) for row in rows]
    dev = [(float(row["step"]), float(row["dev_loss"])) for row in rows if row["dev_loss"]]
    return plot_panels(folder / "loss.png", {"loss": {"train": smooth(train), "dev": dev}}, "step", "loss (nats)")
