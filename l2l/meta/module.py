"""How good a tuner is now: the loss that a short zeroth-order run reaches with it, from the initial weights.

Meta-training in progress: one outer step, validation, and everything that a checkpoint must hold.

The Lightning shell of meta-training: manual optimisation of the tuner, checkpoints, exact resumption.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from l2l.estimators.finite_difference import Closure
from l2l.meta.config import MetaTrainConfig
from l2l.meta.labels import SampledLoss, sampled_loss
from l2l.meta.objectives.base import MetaLoss, MetaState
from l2l.meta.pool import PoolTask, drawn, turn
from l2l.meta.trajectory import accelerate, at_rest, momentum_step, move, replay
from l2l.methods.base import Method
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import CurvatureLR, CurvatureLRState, zo_step
from l2l.params import PerturbedParameters
from l2l.params.blocks import Blocks
from l2l.report.files import read_tensors, write_tensors
from l2l.report.run_directory import MetricsLog, RunDirectory
from l2l.tasks.encode import Batch
from l2l.tasks.evaluate import evaluate
from l2l.tasks.losses import batch_loss
from l2l.train.trainer import Steps
from l2l.tuners.api import Tuner
from l2l.tuners.features import RunStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def short_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    theta: PerturbedParameters,
    pool: PoolTask,
    method: Method[Any],
    steps: int,
    lr: float,
    seed: int,
    curvature_lr: CurvatureLR | None = None,
) -> float:
    """Dev loss after ``steps`` steps of a method on a task; infinite if the run diverged. Theta stays where they led.

    The same seed gives every method the same batches and the same noise.

    Args:
        control: for runs at ``lr="auto"``; ``lr`` is beta then.
    """
    state, rates, seen = method.init(theta.blocks), [lr] * len(theta.blocks), CurvatureLRState()
    try:
        for step in range(steps):
            batch, key = pool.feeder.at(step), Key(seed, step)

            def closure(batch: Batch = batch) -> Tensor:
                return batch_loss(model, batch, pool.feeder.form)

            state, report = zo_step(
                closure, theta, method, state, key, rates, curvature_lr=curvature_lr, curvature_lr_state=seen
            )
            seen = report.curvature_lr_state
    except FloatingPointError:
        return float("inf")
    return evaluate(model, tokenizer, pool.task, pool.dev, grouping=pool.feeder.grouping).loss


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class MetaParts:
    """What meta-training works on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tuner: Tuner
    pool: list[PoolTask]
    validation: list[PoolTask]
    frozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters that were trainable and are to be again."""


@dataclass
class Judgement:
    """Validations so far: losses after short runs, and the weights of the best tuner."""

    mezo: float | None = None
    history: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = -1
    best_loss: float = float("inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)


@final
class MetaLearner:
    """Outer steps over the pool. The model moves along a trajectory; the tuner learns from each point of it."""

    def __init__(self, parts: MetaParts, config: MetaTrainConfig, folder: RunDirectory) -> None:
        self.parts, self.config, self.folder = parts, config, folder
        self.theta = PerturbedParameters(Blocks.of(parts.model))
        period = max(1, config.restart_every // len(parts.pool))
        self.method = Learned(parts.tuner, epsilon=config.epsilon, horizon=period if config.restart_histories else None)
        self.objective = config.learns_by()
        self.trajectory = config.travels()
        self.velocity = {} if self.trajectory.kind == "zo" else at_rest(self.theta.blocks)
        self.histories = [self.method.init(self.theta.blocks) for _ in parts.pool]
        self.memories: list[dict[str, Tensor]] = [{} for _ in parts.pool]
        self.judgement = Judgement()

    def begin(self, resumed: bool) -> None:
        """Keep the initial weights on disk, where restarts and validations find them."""
        if not resumed:
            write_tensors(self.folder.path / "initial.pt", self.weights())

    def weights(self) -> dict[str, Tensor]:
        """The model's trainable tensors by name, sharing memory with it."""
        return {block.name: block.tensor.detach() for block in self.theta.blocks}

    def turn(self, step: int) -> tuple[int, int]:
        """(which task, which of its batches) serves outer step ``step``."""
        tasks = len(self.parts.pool)
        if self.config.sampling == "turn":
            return turn(step, tasks)
        return drawn(step, tuple(self.config.task_weights) or (1.0,) * tasks, self.config.seed)

    def outer_loss(self, step: int) -> tuple[MetaLoss, Closure]:
        """The objective at outer step ``step``, and the loss of its batch."""
        index, number = self.turn(step)
        if step % self.config.restart_every == 0 and step > 0:
            self.restart()
            if self.config.restart_histories:
                self.histories = [self.method.init(self.theta.blocks) for _ in self.histories]
        point = self.point(step, index, number)
        outcome = self.objective(point)
        self.histories[index], self.memories[index] = outcome.history, dict(outcome.memory)
        return outcome, point.closure

    def point(self, step: int, index: int, number: int) -> MetaState:
        """Where the model stands at outer step ``step``, seen by the ``number``-th batch of a task of the pool."""
        model, feeder, config = self.parts.model, self.parts.pool[index].feeder, self.config
        batch, key = feeder.at(number), Key(config.seed, step)

        def loss(batch: Batch) -> Closure:
            return lambda: batch_loss(model, batch, feeder.form)

        def sampled(probe: int) -> SampledLoss:
            return sampled_loss(model, batch, feeder.form, key.with_draw(probe))

        shares = config.trajectory_gradient == "shared" and not self.trajectory.zeroth_order(step, config.seed)
        return MetaState(
            closure=loss(batch),
            other=loss(feeder.further(step, 0)),
            further=lambda i: loss(feeder.further(step, i + 1)),
            theta=self.theta,
            method=self.method,
            history=self.histories[index],
            key=key,
            lr=config.lr,
            consume=accelerate(self.velocity, self.trajectory) if shares else None,
            sampled=sampled,
            memory=self.memories[index],
        )

    def travel(self, step: int, closure: Closure, outcome: MetaLoss) -> float:
        """One step of the model on the same batch; gives the loss that it was taken by."""
        if self.trajectory.zeroth_order(step, self.config.seed):
            replay(self.theta, outcome.report, self.config.lr)
            return outcome.report.loss
        lr = self.trajectory.lr_at(step)
        if self.config.trajectory_gradient == "own":
            return momentum_step(closure, self.theta, self.velocity, lr, self.trajectory)
        move(self.theta, self.velocity, lr, self.trajectory)
        return outcome.loss

    def restart(self) -> None:
        """Back to the initial weights, at rest. The tuner, its histories included, goes on."""
        self.theta.assign(read_tensors(self.folder.path / "initial.pt"))
        for value in self.velocity.values():
            value.zero_()

    def validate(self, step: int) -> float:
        """Judge the tuner; keep it if it is the best so far. The trajectory goes on where it was."""
        write_tensors(self.folder.path / "theta.pt", self.weights())
        if self.judgement.mezo is None:
            self.judgement.mezo = self._mean_loss(MeZO(epsilon=self.config.epsilon))
        runs = self.config.validation_steps if self.method.horizon else None
        loss = self._mean_loss(replace(self.method, horizon=runs))
        self.theta.assign(read_tensors(self.folder.path / "theta.pt"))
        self.judgement.history.append((step, loss))
        if loss < self.judgement.best_loss or not self.judgement.best_weights:
            weights = {name: value.detach().clone() for name, value in self.parts.tuner.network.state_dict().items()}
            self.judgement.best_step, self.judgement.best_loss = step, loss
            self.judgement.best_weights = weights
        return loss

    def _mean_loss(self, method: Any) -> float:
        """Mean over the validation tasks of the loss at each task's best learning rate or beta."""
        config = self.config
        lrs = [(lr, False) for lr in config.validation_lrs] + [
            (beta, True) for beta in config.validation_step_fractions
        ]
        lrs = lrs or [(config.lr, False), (config.lr / 3, False)]
        best = [min(self._loss_after(method, pool, *lr) for lr in lrs) for pool in self.parts.validation]
        return sum(best) / len(best)

    def _loss_after(self, method: Any, pool: PoolTask, lr: float, auto: bool) -> float:
        parts, config = self.parts, self.config
        self.theta.assign(read_tensors(self.folder.path / "initial.pt"))
        # From the first step on: runs are too short to give two away, and all start alike.
        steps, control = config.validation_steps, CurvatureLR(lr, needed=1) if auto else None
        return short_run(parts.model, parts.tokenizer, self.theta, pool, method, steps, lr, config.seed, control)

    def state(self) -> dict[str, Any]:
        """All that an exact continuation needs beside the tuner's weights and its optimizer."""
        return {
            "weights": self.weights(),
            "velocity": self.velocity,
            "histories": [vars(history) for history in self.histories],
            "memories": self.memories,
            "judgement": dict(vars(self.judgement)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was taken."""
        self.theta.assign(state["weights"])
        self.velocity = state["velocity"]
        self.histories = [RunStatistics(**history) for history in state["histories"]]
        self.memories = state["memories"]
        self.judgement = Judgement(**state["judgement"])


COLUMNS = (
    *("task", "train_loss", "objective", "loss_after", "trajectory_loss", "sigma_mean", "sigma_cv"),
    "validation_loss",
)
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
STATE = "meta_learner"


@final
class WholeFiles(CheckpointIO):
    """Checkpoints that are either complete or not there, and are read without executing anything in them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        write_tensors(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_tensors(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


@final
class MetaModule(lightning.LightningModule):
    """One training step is one outer step; ``trainer.global_step`` counts them and is the only clock."""

    def __init__(
        self, learner: MetaLearner, metrics: Callable[[], MetricsLog], advance: Callable[[float], None]
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = learner.parts.tuner.network
        self.learner = learner
        self.metrics = metrics
        self.advance = advance

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.learner.config
        return OPTIMIZERS[config.outer_optimizer](self.network.parameters(), lr=config.outer_lr)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Steps(), batch_size=None)

    def training_step(self, batch: int, batch_idx: int) -> None:
        learner, step = self.learner, self.global_step
        if step % learner.config.validate_every == 0:  # before the step, so that a run that resumes here does it too
            self._validate(step)
        optimizer: Any = self.optimizers()
        outcome, closure = learner.outer_loss(step)
        optimizer.zero_grad()
        self.manual_backward(outcome.surrogate)
        optimizer.step()
        travelled = learner.travel(step, closure, outcome)
        if step % learner.config.log_every == 0:
            sigma = torch.tensor(outcome.report.estimates[0].direction.sigma)
            self._log(
                step,
                task=learner.turn(step)[0],
                train_loss=outcome.report.loss,
                objective=outcome.value,
                loss_after=outcome.loss,
                trajectory_loss=travelled,
                sigma_mean=sigma.mean().item(),
                sigma_cv=(sigma.std() / sigma.mean()).item(),
            )
        self.advance(outcome.report.loss)

    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        done, config = self.global_step, self.learner.config
        if done == config.steps:
            self._validate(done)
        if done % config.checkpoint_every == 0 and done < config.steps:
            self.trainer.save_checkpoint(self.learner.folder.checkpoint)

    def _validate(self, step: int) -> None:
        if self.learner.parts.validation:
            self._log(step, validation_loss=self.learner.validate(step))

    def _log(self, step: int, **values: float) -> None:
        self.metrics().log(step, **values)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = self.learner.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.learner.load_state(checkpoint[STATE])
