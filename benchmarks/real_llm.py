"""Contenders on a real language model at equal cost, tuning counted: the table of docs/protocol.md, "A real LLM".

python benchmarks/real_llm.py --model DIR --data_dir DIR --tuner smollm2-135m --tasks sst2,trec --out runs/real-llm

The budget of a run is counted in forward passes of the whole model over a batch, of which the seconds on one thread are
measured: a pass over the top layers costs its measured share, and the hidden states that it keeps are paid for. So the runs
end after a fixed number of passes of their own, whatever else the machine does, and give the same figures again. A contender
with a grid of n learning rates tries each, on the first seed, with the n-th part of the budget; its best trial there is its
figure with tuning counted. With the best rate it then runs at the whole budget over all seeds: its figure without. Runs that are done are not
repeated; ``--report true`` prints the table of what there is.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from time import thread_time
from typing import Any

import torch

from l2l.experiments.runner import Trial, digest, executor_of, read_run, run_trials
from l2l.experiments.stats import Cell, Run
from l2l.estimators import finite_loss
from l2l.experiments.presets.plan import Cost
from l2l.models.prefix import plan_fills
from l2l.report.console import print_table
from l2l.report.run_directory import METRICS, read_metrics, write_json
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import prepare_fine_tuning

GRID = (3e-5, 1e-4, 3e-4)
BATCH, TIMED = 16, 3


@dataclass(frozen=True)
class Contender:
    """Options of its runs, and the learning rates among which it chooses; none for one that runs as it is."""

    options: Mapping[str, Any]
    grid: tuple[float, ...] = ()
    evaluations: int = 2
    """On dev, per run: cheap for those whose hidden states are kept."""


def contenders(tuner: str | None) -> dict[str, Contender]:
    """By label."""
    top, third = {"train_layers": "top:5"}, {"train_layers": "top:1/3"}
    found = {
        "MeZO": Contender({"method": "mezo"}, GRID),
        "DiZO": Contender({"method": "dizo"}, GRID),
        "MeZO, top third": Contender({"method": "mezo", **third}, GRID, 10),
        "MeZO, top 5": Contender({"method": "mezo", **top}, GRID, 10),
        "LOZO": Contender({"method": "lozo"}, GRID),
        "FZOO": Contender({"method": "fzoo"}, tuple(20 * rate for rate in GRID)),
        "SubZero+": Contender({"method": "subzero_plus"}, GRID),
        "ES": Contender({"method": "es"}, GRID),
        "rsgn, all layers": Contender({"method": "rsgn"}),
        "rsgn, top 5": Contender({"method": "rsgn", **top}, (), 10),
        "AdamW on LoRA (backpropagation)": Contender({"method": "adamw", "scheme": "lora"}, (1e-4, 3e-4, 1e-3)),
    }
    return found if tuner is None else {"tuner": Contender({"tuner": tuner}, (), 10), **found}


@dataclass(frozen=True)
class Bench:
    """Runs contenders on tasks of a model."""

    given: argparse.Namespace
    known: dict[str, Contender] = field(default_factory=dict)

    def options(self, label: str, task: str) -> dict[str, Any]:
        """Of a run, its end and seed left out."""
        sizes = {"train_size": 1000, "dev_size": self.given.dev_size, "test_size": self.given.test_size}
        shared = {"model": self.given.model, "data_dir": self.given.data_dir, "batch_size": BATCH, "task": task}
        return {**shared, **sizes, **self.known[label].options}

    def cost(self, label: str, task: str) -> tuple[Cost, float]:
        """The cost of a contender in passes of the whole model, and the seconds of such a pass; measured once."""
        file = Path(self.given.out) / f"costs-{task}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        backward = self.known[label].options["method"] == "adamw" if "method" in self.known[label].options else False
        run = FineTuneConfig(**self.options(label, task), lr=1e-4 if self.known[label].grid else None)
        context = prepare_fine_tuning(run if run.tuner is None else FineTuneConfig(**self.options(label, task)))
        layers = str(context.config.train_layers)
        for name in {"all", layers} - known.keys():
            known[name] = self._seconds(task, name)
        write_json(file, known)
        unit, share = known["all"], min(1.0, known[layers] / known["all"])
        rows = len(context.data.train)
        states = (1 - share) * rows / BATCH if layers != "all" else 0.0
        if backward:  # a step is a forward and a backward pass, of about two
            return Cost(3.0, 0.0, 1.0, math.inf), unit
        passes = context.optimizer.method.passes
        return Cost(share, states, passes, passes * rows / BATCH), unit

    def _seconds(self, task: str, layers: str) -> float:
        """Shortest of some passes over a batch on one thread, by the thread's own clock; states below the layers are kept."""
        options = self.options("MeZO", task) | {"train_layers": layers, "lr": 1e-4}
        context = prepare_fine_tuning(FineTuneConfig(**options))
        found = []
        for step in range(TIMED):
            closure, cache = context.closures.at(step), None if context.prefix is None else context.prefix.cache
            if cache is not None:
                with cache.attached():
                    for fill in plan_fills(context.model, context.closures.fed(step)):
                        cache.keep(fill, cache.compute(fill))
            for _ in range(2):
                began = thread_time()
                finite_loss(closure) if cache is None else _within(cache, closure)
                found.append(thread_time() - began)
        return median(found)
