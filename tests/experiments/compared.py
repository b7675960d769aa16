"""A comparison small enough to run in a test, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from l2l.experiments import runner
from l2l.experiments.runner import Record, Trial
from l2l.experiments.spec import CompareConfig
from l2l.experiments.stats import Cell, Run

TASK = "world_stars"
SMALL: dict[str, Any] = {
    "settings": [{"name": "tiny", "tasks": [TASK], "batch_size": 4}],
    "methods": ["mezo", "dizo"],
    "grid": [1e-4, 1e-3],
    "step_fraction_grid": [0.1, 0.2],
    "passes": 4,
    "seeds": 1,
    "train_size": 16,
    "dev_size": 8,
    "test_size": 8,
    "evaluations": 1,
    "processes": 1,
    "progress": False,
}

TOY = '''
from dataclasses import dataclass
from l2l.methods.base import MethodInfo, Method

@dataclass(frozen=True)
class Toy(Method):
    """MeZO along plus and minus one."""

    info = MethodInfo("nobody, nowhere", "nothing at all")
    distribution: str = "rademacher"
'''


def small(out: object, **given: Any) -> CompareConfig:
    """The small comparison, with some fields otherwise."""
    return CompareConfig(**SMALL | {"out": str(out)} | given)


@dataclass
class Here:
    """An executor in this process; after ``most`` trials, Ctrl-C."""

    done: list[str] = field(default_factory=list)
    most: int = 1000

    def __call__(self, trials: Sequence[Trial], after_each: Callable[[Record], None]) -> list[Record]:
        records = []
        for trial in trials:
            if len(self.done) == self.most:
                raise KeyboardInterrupt
            records.append(runner.run_trial(trial))
            after_each(records[-1])
            self.done.append(trial.out)
        return records


def result(cell: Cell, label: str, loss: float, accuracy: float = 0.5, seed: int = 0, **given: Any) -> Run:
    """A run of the table that ended with this loss."""
    given = {"train_loss": loss, "accuracy": accuracy, "passes": 100, "seconds": 2.0, "peak_bytes": 2**20, **given}
    return Run(cell, "model", label, "tuner", label, None, seed, False, {"lr": 1e-3}, **given)
