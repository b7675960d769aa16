"""A run's tuning scheme: the model with what is trained, a tuner that fits it, and what is saved of it.

A fine-tuning run in progress: what happens in and around a step, whoever runs the loop.

The bare loop: plain Python around a session.

The Lightning shell around a session: the trainer runs the loop, the session does what is in it.

A baseline from its configuration to the files it leaves: those of a run, in the same shape, after no steps.

Fine-tuning from a configuration to a directory: everything is checked before anything is written.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from l2l.aliases import renamed
from l2l.costs.prediction import Expectation, expect
from l2l.estimators.finite_difference import finite_loss
from l2l.methods.base import FirstOrder
from l2l.methods.learned import Learned
from l2l.methods.registry import MethodLike, build_method, method_name
from l2l.models.batching import Grouping
from l2l.models.heads import compile_decoder
from l2l.models.load import EMBEDDED, context_length, freeze_matching, model_identity
from l2l.models.schemes import ADAPTERS, AdapterBase, apply_scheme, save_adapter
from l2l.optim import ZOOptimizer, schedule_factor
from l2l.report.console import progress_bar, quiet_lightning
from l2l.report.files import read_tensors, write_tensors
from l2l.report.memory import PeakMemory
from l2l.report.plots import plot_panels, smooth
from l2l.report.run_directory import METRICS, MetricsLog, RunDirectory, read_metrics
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import collate, encoder_for
from l2l.tasks.evaluate import Scores, evaluate
from l2l.tasks.rows import Splits
from l2l.train.baselines import baseline_names, build_baseline
from l2l.train.baselines.base import Baseline, Found
from l2l.train.config import FineTuneConfig, resolve, warn
from l2l.train.inputs import Batcher, Closures, RunInputs, choose_closures, load_run_inputs
from l2l.train.runlog import RunLog
from l2l.tuners.model import Tuner
from l2l.tuners.transfer import Level, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def setup_scheme(model: PreTrainedModel, config: FineTuneConfig) -> PreTrainedModel:
    """The model with exactly what the run's scheme trains.

    Raises:
        ValueError: the scheme cannot be applied, or means nothing together with another field; or nothing is left to train.
    """
    if config.scheme != "full" and config.sparse_embeddings:
        raise ValueError(f"sparse_embeddings=True, but scheme {config.scheme!r} trains no word embedding: leave it off")
    if config.scheme in ("prefix", "prompt") and config.compile:
        raise ValueError(f"compile=True does not go with scheme {config.scheme!r}: leave it off")
    found = apply_scheme(model, config.scheme, config.scheme_args, config.seed)
    freeze_matching(found, config.freeze)
    return found


def fitting_tuner(
    tuner: Tuner | str | None, model: PreTrainedModel, scheme: str, match: Level = "exact", told: bool = False
) -> Tuner | None:
    """The tuner bound to the model, with what its scheme trains.

    A tuner of one model has an entry for each block of that model, by name; adapters are blocks of their own, for which it
    has none: with ``kind`` they take the sigma of similar blocks. A size-free tuner serves them at every level.

    Args:
        match: how alike the model must be to the tuner's own; see :func:`l2l.tuners.transfer.matched`.
        told: print what the model is to the tuner, where it is not the same.

    Raises:
        ValueError: the model is less like the tuner's than ``match`` asks.
    """
    if tuner is None:
        return None
    found = Tuner.from_pretrained(tuner) if isinstance(tuner, str) else tuner
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
    if told and not found.size_free and (relation := compare(found, model)).kind != "exact":
        print(f"tuner for {found.provenance.base_model!r} on this model ({relation.kind}): {relation.message}")
    return bound


def warn_of_steps(model: Any, config: FineTuneConfig, method: Any) -> None:
    """Warn where learning rate or epsilon lie far outside what is known for the scheme. Not of first-order methods."""
    if isinstance(method, FirstOrder):
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lr, _ = resolve(config.scheme, config.lr, None)
    if method.step_is_normalized:
        lr = "auto"  # its learning rates are of another size, of which nothing is known here
    warn(config.scheme, lr, method.epsilon, parameters)


def save_trained(model: Any, scheme: str, target: Path) -> None:
    """Write what a run trained: the adapter where there is one, else the whole model."""
    if scheme not in ADAPTERS:
        model.save_pretrained(target)
        return
    source = model_identity(model)
    folder = Path(source.id)  # of a directory, where it lies: a relative one would be looked for from elsewhere
    base = str(folder.resolve()) if source.id and source.id != EMBEDDED and folder.is_dir() else source.id
    save_adapter(model, target, AdapterBase(base, source.revision))


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("train_loss", "projected_gradient", "lr", "curvature", "passes", "seconds", "dev_loss", "dev_metric")


@dataclass(frozen=True)
class RunContext:
    """What a run works on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    splits: Splits
    feeder: Batcher
    optimizer: ZOOptimizer
    closures: Closures
    """What each step minimises."""


@dataclass
class Progress:
    """What a run has reached; saved with each checkpoint."""

    step: int = 0
    passes: int = 0
    seconds: float = 0.0
    best_step: int = -1
    best_dev_loss: float = float("inf")
    """Or, where training minimises another objective than the loss, that on the dev rows."""
    initial_train_loss: float = float("nan")
    initial_dev_loss: float = float("nan")


@final
class Session:
    """Runs steps, evaluates, keeps the best weights, writes checkpoints, and resumes from one exactly."""

    def __init__(self, parts: RunContext, config: FineTuneConfig, folder: RunDirectory) -> None:
        self.parts, self.config, self.folder = parts, config, folder
        self.progress = Progress()
        self._peak_lr: list[float] = [group["lr"] for group in parts.optimizer.param_groups]  # before the schedule
        if folder.resumed:
            self._load()
        after = self.progress.step - 1 if folder.resumed else None
        self.metrics = MetricsLog(folder.path, COLUMNS, after)
        self.log = RunLog(folder.path, self._head(), after)
        self._clock = time.perf_counter()

    def _head(self) -> dict[str, Any]:
        method = self.parts.optimizer.method
        tuner = tuner_hash(method) if isinstance(method, Learned) else None
        epsilon = None if isinstance(method, FirstOrder) else method.epsilon
        return {"seed": self.config.seed, "epsilon": epsilon, "method": self.config.method, "tuner": tuner}

    @property
    def done(self) -> bool:
        """Whether the steps, the passes or the seconds are used up."""
        return self.share >= 1

    @property
    def share(self) -> float:
        """Share of the run that is done, 0 to 1 and more: of its steps, passes or seconds, whichever is furthest."""
        config, now = self.config, self.progress
        passes = 0.0 if config.max_passes is None else now.passes / config.max_passes
        seconds = 0.0 if config.max_seconds is None else now.seconds / config.max_seconds
        return max(now.step / config.steps, passes, seconds)

    def begin(self) -> None:
        """Before the first step: how good is the model as it comes?"""
        self._clock = time.perf_counter()
        if self.progress.step == 0:
            scores = self.dev()
            self._consider(scores, -1)
            self.progress.initial_dev_loss = scores.loss
            self.progress.initial_train_loss = self.scores(self.train_sample).loss
            self._clock = time.perf_counter()

    @property
    def train_sample(self) -> list[Row]:
        """The train rows on which the loss before and after is reported: as many as there are test rows."""
        return self.parts.splits.train[: self.config.test_size]

    def arguments(self) -> dict[str, Any]:
        """What the optimizer's ``step`` is called with next; its learning rates are set as the schedule has them."""
        factor = schedule_factor(self.config.schedule, self.share, self.config.schedule_end)
        for group, lr in zip(self.parts.optimizer.param_groups, self._peak_lr, strict=True):
            group["lr"] = lr * factor
        step, closures = self.progress.step, self.parts.closures
        return {"closure": closures.at(step), "fresh": lambda number: closures.further(step, number)}

    def after_step(self) -> float:
        """Log, evaluate and save as due; gives the step's loss."""
        report, now = self.parts.optimizer.report, self.progress
        assert report is not None, "after_step comes after a step"
        step = now.step
        now.step, now.passes = step + 1, now.passes + report.passes
        self._tick()
        values = {
            "train_loss": report.loss,
            "projected_gradient": report.projected_gradient,
            "lr": report.lr[0],
            "passes": now.passes,
            "seconds": round(now.seconds, 3),
        }
        if report.curvature is not None:
            values["curvature"] = report.curvature
        if now.step % self.config.eval_every == 0 or self.done:
            scores = self.dev()
            values |= {"dev_loss": scores.loss, "dev_metric": scores.value}
            self._consider(scores, step)
        if "dev_loss" in values or step % self.config.log_every == 0:
            self.metrics.log(step, **values)
        self.log.append(report)
        if now.step % self.config.checkpoint_every == 0 or self.done:
            self.save()
        return report.loss

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def dev(self) -> Scores:
        """Scores on the dev rows; not counted as training time."""
        self._tick()
        scores = self.scores(self.parts.splits.dev)
        self._clock = time.perf_counter()
        return scores

    def scores(self, rows: list[Row]) -> Scores:
        """Scores of the model as it stands."""
        parts = self.parts
        parts.optimizer.theta.restore()
        return evaluate(
            parts.model,
            parts.tokenizer,
            parts.task,
            rows,
            max_length=self.config.max_length,
            grouping=parts.feeder.grouping,
            max_new_tokens=self.config.max_new_tokens,
        )

    def _consider(self, scores: Scores, step: int) -> None:
        value = self._minimised(scores)
        if value < self.progress.best_dev_loss:
            self.progress.best_dev_loss, self.progress.best_step = value, step
            write_tensors(self.folder.path / "best.pt", self.weights())

    def _minimised(self, scores: Scores) -> float:
        """What training minimises, on the dev rows that ``scores`` is about."""
        if self.config.objective == scores.metric:  # what the evaluation has just found
            return -scores.value
        found = self.parts.closures.value(self.parts.splits.dev)
        return scores.loss if found is None else found

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name, sharing memory with the model, which stands at theta."""
        self.parts.optimizer.theta.restore()
        return {block.name: block.tensor.detach() for block in self.parts.optimizer.blocks}

    def load_best(self) -> None:
        """Put the weights of the best step into the model."""
        self.parts.optimizer.theta.assign(read_tensors(self.folder.path / "best.pt"))

    def save(self) -> None:
        """Write the checkpoint, whole."""
        self._tick()
        self.log.flush()
        state = {"weights": self.weights(), "optimizer": self.parts.optimizer.state_dict()}
        write_tensors(self.folder.checkpoint, state | {"progress": dict(vars(self.progress))})
        self._clock = time.perf_counter()

    def _load(self) -> None:
        state = read_tensors(self.folder.checkpoint)
        self.parts.optimizer.theta.assign(state["weights"])
        self.parts.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def close(self) -> None:
        """Close the logs."""
        self.metrics.close()
        self.log.close()


def tuner_hash(method: Learned) -> str:
    """Hash of the tuner's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in (method.tuner.network.state_dict() | (method.tuner.basis or {})).items():
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_bare(session: Session, advance: Callable[[float], None]) -> None:
    """Run a session's remaining steps in a plain loop."""
    with session.parts.optimizer.theta.fused_steps():
        while not session.done:
            session.parts.optimizer.step(**session.arguments())
            advance(session.after_step())


@final
class Steps(IterableDataset[int]):
    """Endless step numbers: batches are a function of the step, so the loader has no state to restore."""

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield step
            step += 1


@final
class FineTuneModule(lightning.LightningModule):
    """Manual optimisation with the zeroth-order optimizer as its real optimizer, so that ``global_step`` counts."""

    def __init__(self, session: Session, advance: Callable[[float], None]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.session = session
        self.advance = advance

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.session.parts.optimizer

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Steps(), batch_size=None)

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step(**self.session.arguments())
        self.advance(self.session.after_step())
        self.trainer.should_stop = self.session.done


def fit(trainer: lightning.Trainer, module: lightning.LightningModule, **options: Any) -> None:
    """``trainer.fit``, from which an interrupt leaves as KeyboardInterrupt.

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


def run_lightning(session: Session, advance: Callable[[float], None]) -> None:
    """Run a session's remaining steps under a Lightning trainer."""
    if session.done:
        return
    with quiet_lightning():
        trainer = lightning.Trainer(
            max_steps=session.config.steps - session.progress.step,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu" if session.parts.model.device.type == "cpu" else "gpu",
            devices=1,
        )
        with session.parts.optimizer.theta.fused_steps():
            fit(trainer, FineTuneModule(session, advance))


def measure(baseline: Baseline, ground: RunInputs, config: FineTuneConfig, folder: RunDirectory) -> dict[str, Any]:
    """Measure, and write ``config.yaml``, ``metrics.csv`` and ``summary.json``; what the summary holds.

    Raises:
        ValueError: the baseline means nothing for this task or model; nothing is written then.
    """
    if config.objective != "loss":
        raise ValueError(f"method {config.method!r} trains nothing, so objective {config.objective!r} has no meaning")
    began = time.perf_counter()
    with PeakMemory(ground.model.device) as peak:
        found = baseline.measure(ground, config)
    seconds = time.perf_counter() - began
    folder.create()
    log = MetricsLog(folder.path, COLUMNS)
    values = {"train_loss": found.train.loss, "passes": found.passes, "seconds": round(seconds, 3)}
    log.log(0, **values, dev_loss=found.dev.loss, dev_metric=found.dev.value)
    log.close()
    summary = summary_of(found, ground, config, seconds, peak.bytes)
    folder.finish(summary)
    return summary


def summary_of(found: Found, ground: RunInputs, config: FineTuneConfig, seconds: float, peak: int) -> dict[str, Any]:
    """The fields of a run's summary; where a run has a best step and a last one, a baseline has the same twice."""
    train, dev, test = found.train.plain(), found.dev.plain(), found.test.plain()
    splits, notes = ground.splits, [note for note in (ground.splits.note, found.note) if note]
    return {
        "task": ground.task.label,
        "method": config.method,
        "scheme": "none",
        "model": vars(model_identity(ground.model)),
        "lr": None,
        "epsilon": None,
        "seed": config.seed,
        "steps": 0,
        "passes": found.passes,
        "seconds": round(seconds, 2),
        "estimate": {"peak_bytes": None, "seconds_per_step": None},
        "measured": {"peak_bytes": peak, "seconds_per_step": None},
        "initial_loss": found.initial.loss,
        "final_loss": train["loss"],
        "accuracy": test["value"],
        "last": {"train": train, "test": test},
        "best": {"step": -1, "dev": dev, "test": test},
        "objective": {"name": config.objective, "best_dev": dev["loss"]},
        "rows": {name: len(getattr(splits, name)) for name in ("train", "dev", "test")},
        "note": "; ".join(notes),
        "blocks": 0,
        "trained_parameters": found.trained,
        "perturb": None,
        "update": None,
        "dtype": str(ground.model.dtype).removeprefix("torch."),
        "baseline": found.details,
        "config": asdict(config),
    }


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
    options = renamed(options, {field.name for field in fields(FineTuneConfig)})
    config = FineTuneConfig(
        model=model if isinstance(model, str) else model_identity(model).id or type(model).__name__,
        task=task,
        method=method_name(method),
        tuner=tuner.provenance.base_model if isinstance(tuner, Tuner) else tuner,
        **options,
    )
    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    return start_fine_tuning(config, folder, None if isinstance(model, str) else model, tokenizer, method, tuner)


def start_fine_tuning(
    config: FineTuneConfig,
    folder: RunDirectory,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
) -> FineTuneResult:
    """Prepare a run and run it, or measure a baseline that takes no steps (:mod:`l2l.train.baselines`).

    Raises:
        ValueError, FileNotFoundError: bad input, named, before anything is written.
        FloatingPointError: the loss is not finite.
    """
    if config.method not in baseline_names():
        return run_fine_tuning(prepare_fine_tuning(config, model, tokenizer, method, tuner), config, folder)
    baseline = build_baseline(config.method, config.method_args, tuner or config.tuner)
    ground = load_run_inputs(config, model, tokenizer)
    return FineTuneResult(ground.model, measure(baseline, ground, config, folder), folder.path)


def prepare_fine_tuning(
    config: FineTuneConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: MethodLike | None = None,
    tuner: Tuner | str | None = None,
) -> RunContext:
    """Load model, data and method, and read one loss: what can be wrong shows here. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: bad input, named.
        FloatingPointError: the loss of the first batch is not finite.
    """
    ground = load_run_inputs(config, model, tokenizer)
    tokenizer, task, splits = ground.tokenizer, ground.task, ground.splits
    model = setup_scheme(ground.model, config)
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
        perturb=config.perturb,
        update=config.update,
        curvature_lr=config.curvature_lr(),
        sparse_embeddings=config.sparse_embeddings,
    )
    _check_forward(config, model, optimizer)
    limit = context_length(model, config.max_length)
    reader = encoder_for(model)
    encoded = reader.encode(task, splits.train, tokenizer, limit)
    grouping = Grouping.of(model, config.length_groups, config.share_prompts)
    feeder = Batcher(
        encoded, task.form, reader.pad_id(tokenizer), config.batch_size, config.seed, model.device, grouping
    )
    if config.compile:
        compile_decoder(model)
    closures = choose_closures(config, built, model, tokenizer, task, splits.train, feeder)
    parts = RunContext(model, tokenizer, task, splits, feeder, optimizer, closures)
    _read_first_loss(parts)
    return parts


def _check_forward(config: FineTuneConfig, model: PreTrainedModel, optimizer: ZOOptimizer) -> None:
    """Refuse what would only show in the first step."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.sparse_embeddings and head is not None and head.weight is embedding.weight:
        raise ValueError(
            "sparse_embeddings=True, but the embedding is tied to the head, whose logits read every row: leave it off"
        )
    if config.compile and (config.sparse_embeddings or optimizer.theta.mode == "functional"):
        raise ValueError(
            "compile=True needs weights that are walked in place: a compiled forward cannot be given transient copies. "
            "Leave compile off, or use float32 with perturb='in_place' and sparse_embeddings off"
        )


def _read_first_loss(parts: RunContext) -> None:
    try:
        finite_loss(parts.closures.at(0))
    except FloatingPointError as error:
        raise FloatingPointError(f"step 0, before any update: {error}") from error


def run_fine_tuning(parts: RunContext, config: FineTuneConfig, folder: RunDirectory) -> FineTuneResult:
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
            pass

            run_lightning(session, advance)
        else:
            pass

            run_bare(session, advance)


def _expected(parts: RunContext, config: FineTuneConfig) -> Expectation:
    """What the run is going to need: told before it begins, and beside what was measured when it has ended."""
    feeder, theta = parts.feeder, parts.optimizer.theta
    longest = sorted(feeder.examples, key=lambda example: -max(len(option.ids) for option in example.options))
    whole = replace(feeder.grouping, groups=1)
    evaluated = collate(longest[:EVALUATED], "classification", feeder.pad_id, grouping=whole)
    batches = [feeder.at(step) for step in range(0, config.steps, max(1, config.steps // SAMPLED))]
    return expect(
        parts.model,
        parts.optimizer.blocks,
        theta.mode,
        theta.update == "master",
        parts.optimizer.method,
        batches,
        [evaluated],
        measure=config.steps >= WORTH_MEASURING,
        every=config.curvature_every if config.lr == "auto" else 0,
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
        "perturb": parts.optimizer.theta.mode,
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


def _save_model(parts: RunContext, scheme: str, target: Path) -> None:
    save_trained(parts.model, scheme, target)
    parts.tokenizer.save_pretrained(target)


def draw_curves(folder: Path, objective: str = "loss") -> Path:
    """``loss.png`` from ``metrics.csv``: what training minimised, smoothed, and the loss on dev."""
    rows = read_metrics(folder / METRICS)
    train = [(float(row["step"]), float(row["train_loss"])) for row in rows]
    dev = [(float(row["step"]), float(row["dev_loss"])) for row in rows if row["dev_loss"]]
    if objective == "loss":
        return plot_panels(folder / "loss.png", {"loss": {"train": smooth(train), "dev": dev}}, "step", "loss (nats)")
    panels = {objective: {"train": smooth(train)}, "loss (nats)": {"dev": dev}}
    return plot_panels(folder / "loss.png", panels, "step", "value")
