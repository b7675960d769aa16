"""The Lightning shell of meta-training: manual optimisation of the tuner, checkpoints, exact resumption."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.utils.data import DataLoader

from l2l.finetune.module import Steps
from l2l.meta.learner import MetaLearner
from l2l.report.files import read_tensors, write_tensors
from l2l.report.metrics import MetricsLog

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
