"""Meta-training in progress: one outer step, validation, and everything that a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from l2l.blocks import Blocks
from l2l.estimators.base import Closure
from l2l.finetune.control import StepControl
from l2l.meta.config import MetaTrainConfig
from l2l.meta.labels import SampledLoss, sampled_loss
from l2l.meta.objectives.base import Outcome, Point
from l2l.meta.pool import PoolTask, drawn, turn
from l2l.meta.trajectory import accelerate, at_rest, momentum_step, move
from l2l.meta.validate import short_run
from l2l.meta.walk import replay
from l2l.methods.learned import Learned
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.perturb import Theta
from l2l.report.files import read_tensors, write_tensors
from l2l.report.rundir import RunDirectory
from l2l.tasks.encode import Batch
from l2l.tasks.losses import batch_loss
from l2l.tuners.features import History
from l2l.tuners.tuner import Tuner

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
        self.theta = Theta(Blocks.of(parts.model))
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

    def look(self, step: int) -> tuple[Outcome, Closure]:
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

    def point(self, step: int, index: int, number: int) -> Point:
        """Where the model stands at outer step ``step``, seen by the ``number``-th batch of a task of the pool."""
        model, feeder, config = self.parts.model, self.parts.pool[index].feeder, self.config
        batch, key = feeder.at(number), Key(config.seed, step)

        def loss(batch: Batch) -> Closure:
            return lambda: batch_loss(model, batch, feeder.form)

        def sampled(probe: int) -> SampledLoss:
            return sampled_loss(model, batch, feeder.form, key.with_draw(probe))

        shares = config.trajectory_gradient == "shared" and not self.trajectory.zeroth_order(step, config.seed)
        return Point(
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

    def travel(self, step: int, closure: Closure, outcome: Outcome) -> float:
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
        lrs = [(lr, False) for lr in config.validation_lrs] + [(beta, True) for beta in config.validation_betas]
        lrs = lrs or [(config.lr, False), (config.lr / 3, False)]
        best = [min(self._loss_after(method, pool, *lr) for lr in lrs) for pool in self.parts.validation]
        return sum(best) / len(best)

    def _loss_after(self, method: Any, pool: PoolTask, lr: float, auto: bool) -> float:
        parts, config = self.parts, self.config
        self.theta.assign(read_tensors(self.folder.path / "initial.pt"))
        # From the first step on: runs are too short to give two away, and all start alike.
        steps, control = config.validation_steps, StepControl(lr, needed=1) if auto else None
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
        self.histories = [History(**history) for history in state["histories"]]
        self.memories = state["memories"]
        self.judgement = Judgement(**state["judgement"])
