"""Meta-training as one Lightning module: outer steps, trajectory, validation, and the state that exact resumption needs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.utils.data import DataLoader

from l2l.estimators import Closure
from l2l.meta.config import INITIAL, THETA, MetaTrainConfig
from l2l.meta.outer_step import OuterStep, learned_method, meta_state
from l2l.meta.pool import MetaInputs, PoolTask, sampled_task
from l2l.meta.population import Population
from l2l.meta.state import MetaLoss, MetaState
from l2l.meta.trajectory import accumulate_velocity, apply_velocity, inner_steps, momentum_step, replay, zero_velocity
from l2l.methods.base import Method
from l2l.methods.mezo import MeZO
from l2l.noise import Key
from l2l.optim import CurvatureLR
from l2l.params import Blocks, PerturbedParameters
from l2l.report.console import progress_bar, quiet_lightning
from l2l.report.run_directory import MetricsLog, RunDirectory, StopRequest, stop_requests
from l2l.tasks.evaluate import evaluate
from l2l.train.trainer import Steps, fit, stopped
from l2l.tuners.features import RunStatistics

MEASURES = ("task", "train_loss", "objective", "loss_after", "trajectory_loss", "sigma_mean", "sigma_cv")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
STATE = "meta_learner"
"""Key of the module's state in a checkpoint."""


@dataclass
class Validations:
    """Losses after short runs so far, and the weights of the best tuner."""

    mezo: float | None = None
    """The same with MeZO in place of the tuner."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(outer step, loss)."""
    best_step: int = -1
    best_loss: float = float("inf")
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)


@final
class WholeFiles(CheckpointIO):
    """The checkpoints of a run's directory: complete or not there, and read without executing anything in them."""

    def __init__(self, folder: RunDirectory) -> None:
        self.folder = folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.folder.write_checkpoint(checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return self.folder.read_checkpoint()[1]

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


@final
class MetaTraining(lightning.LightningModule):
    """Manual optimisation of the tuner's weights: one training step is one outer step on one batch of one task.

    ``global_step`` counts outer steps, and batches and keys are functions of it. ``initial.safetensors`` in the run's
    directory holds the model's initial weights, for restarts and validations.
    """

    def __init__(
        self, inputs: MetaInputs, config: MetaTrainConfig, folder: RunDirectory, population: Population | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = inputs.tuner.network
        self.inputs, self.config, self.folder, self.population = inputs, config, folder, population
        self.metrics: MetricsLog | None = None
        self.advance: Callable[[float], None] = lambda loss: None
        """Called with the loss of every outer step, for a progress bar."""
        self.theta = PerturbedParameters(Blocks.of(inputs.model))
        self.method = learned_method(inputs, config)
        self.objective = config.make_objective()
        self.velocity = {} if config.trajectory == "zo" else zero_velocity(self.theta.blocks)
        self.histories = [self.method.init(self.theta.blocks) for _ in inputs.pool]
        """Run statistics by task."""
        self.memories: list[dict[str, torch.Tensor]] = [{} for _ in inputs.pool]
        """State of the objective by task."""
        self.validations = Validations()
        self.asked = StopRequest()
        """Whether a signal has asked the run to stop."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.config.outer_optimizer](self.network.parameters(), lr=self.config.outer_lr)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Steps(), batch_size=None)

    def training_step(self, batch: int, batch_idx: int) -> None:
        step = self.global_step
        if step % self.config.validate_every == 0:  # before the step, so that a run that resumes here does it too
            self._validate(step)
        optimizer: Any = self.optimizers()
        outcome, closure = self.outer_loss(step)
        optimizer.zero_grad()
        self.manual_backward(outcome.surrogate)
        optimizer.step()
        trajectory_loss = self.inner_step(step, closure, outcome)
        if step % self.config.log_every == 0:
            sigma = torch.tensor(outcome.report.estimates[0].direction.sigma)
            losses = outcome.report.loss, outcome.value, outcome.loss, trajectory_loss
            spread = sigma.mean().item(), (sigma.std() / sigma.mean()).item()
            self._log(step, **dict(zip(MEASURES, (self.task_of(step)[0], *losses, *spread), strict=True)))
        self.advance(outcome.report.loss)

    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        done = self.global_step
        if done == self.config.steps:
            self._validate(done)
        elif done % self.config.checkpoint_every == 0 or self.asked.number is not None:
            asked = self.asked.number is not None  # asked from here on, it ends after the next step
            self.trainer.save_checkpoint(self.folder.checkpoint)
            self.trainer.should_stop = asked

    def on_train_start(self) -> None:
        self.asked.install()

    def _log(self, step: int, **values: float) -> None:
        if self.metrics is not None:
            self.metrics.log(step, **values)

    def task_of(self, step: int) -> tuple[int, int]:
        """(task of the pool, which of its batches) of outer step ``step``."""
        tasks = len(self.inputs.pool)
        if self.config.sampling == "turn":
            return step % tasks, step // tasks
        return sampled_task(step, tuple(self.config.task_weights) or (1.0,) * tasks, self.config.seed)

    def outer_loss(self, step: int) -> tuple[MetaLoss, Closure]:
        """The objective at outer step ``step``, and the loss of its batch."""
        index, number = self.task_of(step)
        if step % self.config.restart_every == 0 and step > 0:
            self.restart()
            if self.config.restart_histories:
                self.histories = [self.method.init(self.theta.blocks) for _ in self.histories]
        state = self.meta_state(step, index, number)
        outcome = self.objective(state)
        self.histories[index], self.memories[index] = outcome.history, dict(outcome.memory)
        return outcome, state.closure

    def meta_state(self, step: int, index: int, number: int) -> MetaState:
        """The model at outer step ``step``, seen through batch ``number`` of task ``index`` of the pool."""
        config, population = self.config, self.population
        shares = config.trajectory_gradient == "shared" and not config.zeroth_order(step)
        consume = accumulate_velocity(self.velocity, config.inner_momentum) if shares else None
        at = OuterStep(step, index, number, self.histories[index], self.memories[index])
        state = meta_state(self.inputs, config, self.theta, self.method, at, consume)
        if population is None:
            return state
        return replace(state, elsewhere=partial(population.evaluate, self.theta, self.network, at))

    def inner_step(self, step: int, closure: Closure, outcome: MetaLoss) -> float:
        """One step of the model on the batch of outer step ``step``. Returns the loss that it was taken by."""
        config = self.config
        if config.zeroth_order(step):
            replay(self.theta, outcome.report, config.lr)
            return outcome.report.loss
        motion = config.inner_lr_at(step), config.inner_momentum, config.inner_clip
        if config.trajectory_gradient == "own":
            return momentum_step(closure, self.theta, self.velocity, *motion)
        apply_velocity(self.theta, self.velocity, *motion)
        return outcome.loss

    def restart(self) -> None:
        """Put the model back to its initial weights, with velocity zero. Tuner and run statistics stay."""
        self.theta.assign(self.folder.read(INITIAL))
        for value in self.velocity.values():
            value.zero_()

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's trainable tensors by name, sharing memory with it."""
        return {block.name: block.tensor.detach() for block in self.theta.blocks}

    def _validate(self, step: int) -> None:
        """Log the tuner's validation loss, and keep its weights if it is the best so far. The model is left as it was."""
        if not self.inputs.validation:
            return
        found = self.validations
        self.folder.write(THETA, self.weights())
        if found.mezo is None:
            found.mezo = self._validation_loss(MeZO(epsilon=self.config.epsilon))
        steps = self.config.validation_steps if self.method.horizon else None
        loss = self._validation_loss(replace(self.method, horizon=steps))
        self.theta.assign(self.folder.read(THETA))
        found.history.append((step, loss))
        if loss < found.best_loss or not found.best_weights:
            found.best_step, found.best_loss = step, loss
            found.best_weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self._log(step, validation_loss=loss)

    def _validation_loss(self, method: Method[Any]) -> float:
        """Mean over the validation tasks of the loss after a short run at each task's best learning rate."""
        config = self.config
        rates: list[tuple[float, CurvatureLR | None]] = [(lr, None) for lr in config.validation_lrs]
        # needed=1: short runs cannot spare the steps that wait for further measurements, and all start alike.
        rates += [(share, CurvatureLR(share, needed=1)) for share in config.validation_step_fractions]
        rates = rates or [(config.lr, None), (config.lr / 3, None)]
        model, steps = self.inputs.model, range(config.validation_steps)

        def loss_after(task: PoolTask, lr: float, curvature_lr: CurvatureLR | None) -> float:
            """Dev loss; infinite if the run diverged. All methods see the same batches and noise."""
            self.theta.assign(self.folder.read(INITIAL))
            batches = ((task.loss(model, task.batcher.at(step)), Key(config.seed, step)) for step in steps)
            try:
                for _ in inner_steps(self.theta, method, method.init(self.theta.blocks), batches, lr, curvature_lr):
                    pass
            except FloatingPointError:
                return float("inf")
            return evaluate(model, self.inputs.tokenizer, task.task, task.dev, grouping=task.batcher.grouping).loss

        best = [min(loss_after(task, *rate) for rate in rates) for task in self.inputs.validation]
        return sum(best) / len(best)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {
            "weights": self.weights(),
            "velocity": self.velocity,
            "histories": [vars(history) for history in self.histories],
            "memories": self.memories,
            "judgement": dict(vars(self.validations)),
            "metrics": None if self.metrics is None else self.metrics.extent,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint[STATE]
        self.theta.assign(state["weights"])
        self.velocity = state["velocity"]
        self.histories = [RunStatistics(**history) for history in state["histories"]]
        self.memories = state["memories"]
        self.validations = Validations(**state["judgement"])


def train(module: MetaTraining) -> None:
    """Run the remaining outer steps under a Lightning trainer."""
    config, folder = module.config, module.folder
    path, state = folder.read_checkpoint() if folder.resumed else (None, {})
    done: int = state.get("global_step", 0)
    after, known = (done - 1, state[STATE].get("metrics")) if folder.resumed else (None, None)
    module.metrics = MetricsLog(folder.path, (*MEASURES, "validation_loss"), after, known)
    try:
        bar = progress_bar("meta-train", config.steps, done, config.progress)
        with stop_requests() as module.asked, quiet_lightning(), bar as module.advance:
            off: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
            length: Any = {"max_steps": config.steps, "max_epochs": -1}
            trainer = lightning.Trainer(**length, **off, plugins=[WholeFiles(folder)], accelerator="cpu", devices=1)
            fit(trainer, module, ckpt_path=path and str(path), weights_only=True)
        if trainer.global_step < config.steps and module.asked.number is not None:
            raise stopped(f"after outer step {trainer.global_step}", folder, module.asked.number)
    finally:
        module.metrics.close()
