"""A fine-tuning run in progress: what happens in and around a step, whoever runs the loop."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from l2l.finetune.batches import Batcher
from l2l.finetune.closures import Closures
from l2l.finetune.config import FineTuneConfig
from l2l.finetune.control import schedule_factor
from l2l.finetune.optimizer import ZOOptimizer
from l2l.finetune.runlog import RunLog
from l2l.methods.base import FirstOrder
from l2l.methods.learned import Learned
from l2l.report.files import read_tensors, write_tensors
from l2l.report.metrics import MetricsLog
from l2l.report.rundir import RunDirectory
from l2l.tasks.base import Row, Task
from l2l.tasks.evaluate import Scores, evaluate
from l2l.tasks.rows import Splits

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
        """Whether the steps or the passes are used up."""
        limit = self.config.max_passes
        return self.progress.step >= self.config.steps or (limit is not None and self.progress.passes >= limit)

    @property
    def share(self) -> float:
        """How much of the run lies behind, 0 to 1: of its steps or of its passes, whichever is further."""
        limit = self.config.max_passes
        spent = 0.0 if limit is None else self.progress.passes / limit
        return max(self.progress.step / self.config.steps, spent)

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
