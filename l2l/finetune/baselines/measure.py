"""A baseline from its configuration to the files it leaves: those of a run, in the same shape, after no steps."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from l2l.finetune.baselines.base import Baseline, Found
from l2l.finetune.config import FineTuneConfig
from l2l.finetune.ground import RunInputs
from l2l.finetune.session import COLUMNS
from l2l.models.load import model_identity
from l2l.report.memory import PeakMemory
from l2l.report.metrics import MetricsLog
from l2l.report.rundir import RunDirectory


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
        "walk": None,
        "update": None,
        "dtype": str(ground.model.dtype).removeprefix("torch."),
        "baseline": found.details,
        "config": asdict(config),
    }
