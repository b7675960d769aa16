"""The Lightning shell around a session: the trainer runs the loop, the session does what is in it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, final

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

from l2l.finetune.session import Session
from l2l.report.quiet import quiet_lightning


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
