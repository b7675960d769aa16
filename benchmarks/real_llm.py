"""Contenders on a real language model at equal cost, tuning counted: the table of docs/protocol.md, "A real LLM".

python benchmarks/real_llm.py --model DIR --data_dir DIR --tuner smollm2-135m --tasks sst2,trec --out runs/real-llm

The budget of a run, in seconds or in forward passes of the whole model over a batch, becomes a number of passes of its own by
what these take on one thread, which is measured once: a pass over the top layers costs its share, and the hidden states that it
keeps are paid for. So runs end where other work of the machine has no influence, and give the same figures again. A contender
with a grid of n learning rates tries each on the first seed with the n-th part of the budget; the best of these trials is its
figure with tuning counted. With the best rate it then runs at the whole budget over all seeds: its figure without. Runs that
are done are not repeated; with ``--report`` nothing is run, and the table is of what there is.
"""

import argparse
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from l2l.estimators import finite_loss
from l2l.experiments.presets.plan import Cost, pass_seconds
from l2l.experiments.runner import Trial, digest, executor_of, experiment_inputs, read_run, run_trials
from l2l.experiments.spec import freeze
from l2l.experiments.stats import Cell, Run
from l2l.methods import default_lr
from l2l.methods.registry import declared_method
from l2l.report.console import print_table
from l2l.report.run_directory import METRICS, SUMMARY, read_metrics, write_json
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import RunContext, prepare_fine_tuning
from l2l.tuners import Tuner

GRID = (3e-5, 1e-4, 3e-4)
BATCH = 16
BATCHES = 5
"""Over which a pass is timed; its seconds are their median."""
BACKWARD = 3.0
"""Forward passes to which a step of backpropagation comes."""


@dataclass(frozen=True)
class Contender:
    """Options of its runs, and the learning rates among which it chooses; none where it runs as it is."""

    options: Mapping[str, Any]
    grid: tuple[float, ...] = ()
    evaluations: int = 2
    """On dev, per run; more where hidden states are kept, which makes them cheap."""


def contenders(tuner: str | None) -> dict[str, Contender]:
    """By label."""
    found = {
        "MeZO": Contender({"method": "mezo"}, GRID),
        "MeZO, top third": Contender({"method": "mezo", "train_layers": "top:1/3"}, GRID, 10),
        "MeZO, top 5": Contender({"method": "mezo", "train_layers": "top:5"}, GRID, 10),
        "DiZO": Contender({"method": "dizo"}, GRID),
        "LOZO": Contender({"method": "lozo"}, GRID),
        "FZOO": Contender({"method": "fzoo"}, tuple(60 * rate for rate in GRID)),
        "SubZero+": Contender({"method": "subzero_plus"}, GRID),
        "ES": Contender({"method": "es"}, GRID),
        "rsgn, all layers": Contender({"method": "rsgn"}, (), 4),
        "rsgn, top 5": Contender({"method": "rsgn", "train_layers": "top:5"}, (), 10),
        "AdamW on LoRA": Contender({"method": "adamw", "scheme": "lora"}, (1e-4, 3e-4, 1e-3)),
    }
    if tuner is None:
        return found
    whole = Contender({"tuner": tuner, "train_layers": "all"}, (), 5)
    return {"tuner": Contender({"tuner": tuner}, (), 10), "tuner, all layers": whole, **found}


@dataclass(frozen=True)
class Bench:
    """Runs contenders on tasks of a model."""

    given: argparse.Namespace
    contenders: Mapping[str, Contender]
    read: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> fingerprint of what its runs read, as far as it is known."""

    @property
    def folder(self) -> Path:
        """Of everything."""
        return Path(self.given.out)

    def options(self, label: str, task: str) -> dict[str, Any]:
        """Of its runs; their end, seed and learning rate left out."""
        own = dict(self.contenders[label].options)
        if "tuner" in own:  # what its plan says, in words: a run of the same options is not repeated
            plan = Tuner.from_pretrained(own["tuner"]).plan
            assert plan is not None, "a tuner without a plan has numbers to choose"
            layers = own.get("train_layers", plan.train_layers(self.budget(task)))
            own = {**plan.options_at(layers), "train_layers": layers, **own}
        return {**self.shared(task), **own}

    def shared(self, task: str) -> dict[str, Any]:
        """Options of all runs on a task."""
        given = self.given
        sizes = {"train_size": given.train_size, "dev_size": given.dev_size, "test_size": given.test_size}
        return {"model": given.model, "data_dir": given.data_dir, "batch_size": BATCH, "task": task, **sizes}

    def budget(self, task: str) -> float:
        """Of a run, in forward passes of the whole model."""
        return self.given.budget if self.given.unit == "passes" else self.given.budget / self.whole(task)

    def whole(self, task: str) -> float:
        """Seconds of a pass of the whole model on one thread; measured once."""
        return self.timed({**self.shared(task), "method": "mezo", "lr": GRID[0]})

    def timed(self, options: Mapping[str, Any]) -> float:
        """Seconds of a pass of a run; measured once for all runs whose passes are alike."""
        file = self.folder / "costs.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        name = f"{options['task']} {options.get('train_layers', 'all')}"
        if reads_outputs(options):  # the first of a step costs more than the others
            method = declared(options)
            name += f" {options['method']} {method.passes:g}"
            name += "" if method.whole_passes == method.passes else f" {method.whole_passes:g} whole"
        if name not in known:
            known[name] = seconds_of_a_pass(prepare(options))
            write_json(file, known)
        return known[name]

    def inputs(self, task: str) -> dict[str, Any]:
        """Fingerprint of what the runs of a task read."""
        if task not in self.read:
            self.read[task] = experiment_inputs(prepare({**self.shared(task), "method": "mezo"}))
        return self.read[task]

    def cost(self, label: str, task: str) -> Cost:
        """What its runs cost, in passes of the whole model; of a pass over the top layers it is measured."""
        options = self.options(label, task)
        if options["method"] == "adamw":
            return Cost(BACKWARD, 0.0, 1.0, math.inf)
        share = min(1.0, self.timed(options) / self.whole(task))
        passes, epoch = declared(options).passes, self.inputs(task)["train rows"]["number"] / BATCH
        states = 0.0 if options.get("train_layers", "all") == "all" else (1 - share) * epoch  # kept from step to step
        return Cost(share, states, passes, epoch * passes)

    def trial(self, label: str, task: str, budget: float, seed: int, lr: float | None, tuning: bool = False) -> Trial:
        """A run at a budget in whole passes."""
        one, cost = self.contenders[label], self.cost(label, task)
        passes = cost.limit(budget)
        every = max(1, math.ceil(passes / cost.passes / (1 if tuning else one.evaluations)))
        options: dict[str, Any] = {"tuner": None, **self.options(label, task), "seed": seed}
        options |= {"max_passes": passes, "eval_every": every, "checkpoint_every": 10**6}
        options["lr"] = options.get("lr", default_lr(options["method"])) if lr is None else lr
        if tuning:
            options["test_size"] = 1
        out = str(self.folder / "runs" / f"{task}-{options['method']}-s{seed}-{digest(options, self.inputs(task))}")
        where = Cell("real-llm", "full", task), self.given.model, label, "", options["method"], options["tuner"]
        return Trial(Run(*where, seed, tuning, {"lr": lr}, folder=out), options, out)


def prepare(options: Mapping[str, Any]) -> RunContext:
    """A run that is set up, without a tuner, whose sigma costs nothing here."""
    names = ["model", "data_dir", "batch_size", "task", "train_size", "dev_size", "test_size", "train_layers"]
    method = "mezo"  # whose passes are those of all that read the loss alone
    if reads_outputs(options):
        method, names = options["method"].removeprefix("learned+"), [*names, "num_directions", "method_args"]
    given = {name: options[name] for name in names if name in options}
    return prepare_fine_tuning(FineTuneConfig(**given, method=method, lr=default_lr(method) or GRID[0]))


def reads_outputs(options: Mapping[str, Any]) -> bool:
    """Whether the method of a run reads more than the loss."""
    return getattr(declared(options), "reads_outputs", False)


def declared(options: Mapping[str, Any]) -> Any:
    """The method of a run."""
    args = dict(options.get("method_args") or {})
    if options.get("num_directions"):
        args["num_directions"] = options["num_directions"]
    return declared_method(options["method"], args, torch.nn.Linear(2, 2))


def seconds_of_a_pass(context: RunContext) -> float:
    """Median over some batches; hidden states below the trained layers are kept."""
    found, prefix, method = [], context.prefix, context.optimizer.method
    for step in range(BATCHES):
        with nullcontext() if prefix is None else prefix.cache.attached():
            if prefix is not None:
                prefix.cache.plan(prefix.fills)
                finite_loss(context.closures.at(step))
            found.append(pass_seconds(context.closures, step, method.passes, method.whole_passes, context.model.device))
    return median(found)


# The table.


def curve(run: Run, cost: Cost) -> list[tuple[float, float]]:
    """(cost in whole passes, dev loss) at its evaluations."""
    rows = [row for row in read_metrics(Path(run.folder) / METRICS) if row["dev_loss"]]
    return [(cost.spent(float(row["passes"])), float(row["dev_loss"])) for row in rows]


def cost_to_reach(target: float, points: list[tuple[float, float]]) -> float:
    """Cost after which the loss is first at or below the target; infinite if never."""
    return next((cost for cost, loss in points if loss <= target), math.inf)


def untrained(run: Run) -> float:
    """Dev loss before the first step."""
    summary = Path(run.folder) / SUMMARY
    return float(json.loads(summary.read_text())["initial_dev_loss"]) if summary.is_file() else math.nan


def rows_of(
    bench: Bench, task: str, tuned: Mapping[tuple[str, str], Run], runs: Mapping[tuple[str, str, int], Run]
) -> list[dict[str, Any]]:
    """A row per contender: at the whole budget, means over its seeds; with tuning counted; and the cost to MeZO's last loss."""
    found = []
    for label in bench.contenders:
        own = {seed: run for (where, whose, seed), run in runs.items() if (where, whose) == (task, label)}
        if not own:
            continue
        cost = bench.cost(label, task)
        reach = []
        for seed, run in own.items():
            mezo = runs.get((task, "MeZO", seed))
            if mezo is not None and not run.diverged and not mezo.diverged:
                reach.append(cost_to_reach(mezo.dev_loss, curve(run, cost)) / bench.budget(task))
        trial = tuned.get((task, label))
        losses = [run.dev_loss for run in own.values()]
        found.append(
            {
                "task": task,
                "contender": label,
                "lr": trial.point["lr"] if trial else None,
                "seeds": len(own),
                "passes": fmean(run.passes for run in own.values()),
                "untrained": fmean(untrained(run) for run in own.values()),
                "dev loss": fmean(losses),
                "least": min(losses),
                "most": max(losses),
                "best dev loss": fmean(run.best_dev_loss for run in own.values()),
                "tuning counted": trial.dev_loss if trial else own[min(own)].dev_loss,
                "accuracy": fmean(run.best_accuracy for run in own.values()),
                "cost to MeZO's loss": median(reach) if reach else None,
            }
        )
    return found


def chosen(runs: list[Run]) -> dict[tuple[str, str], Run]:
    """(task, contender) -> its trial of lowest dev loss."""
    found: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: -run.dev_loss):
        found[run.cell.task, run.contender] = run
    return found


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, a gguf file, or a hub id")
    parser.add_argument("--data_dir", help="holds TASK/{train,validation}.jsonl")
    parser.add_argument("--tuner", help="a tuner with a plan, to judge")
    parser.add_argument("--tasks", required=True, help="separated by commas")
    parser.add_argument("--contenders", default="MeZO", help="labels separated by semicolons, beside the tuner")
    parser.add_argument("--budget", type=float, default=300.0, help="of a run")
    what = "of the budget; seconds are those of one thread, by what a pass takes, and become a number of passes"
    parser.add_argument("--unit", choices=("passes", "seconds"), default="seconds", help=what)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_size", type=int, default=1000)
    parser.add_argument("--dev_size", type=int, default=200)
    parser.add_argument("--test_size", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/real-llm")
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = contenders(given.tuner)
    labels = [*(["tuner"] if given.tuner else []), *filter(None, given.contenders.split(";"))]
    if given.tuner:
        given.tuner = str(freeze(Tuner.from_pretrained(given.tuner), Path(given.out) / "tuners"))
        known = contenders(given.tuner)
    bench = Bench(given, {label: known[label] for label in labels})
    execute = executor_of("local", given.processes)

    def done(trials: list[Trial], what: str) -> list[Run]:
        if given.report:
            return [read_run(trial) for trial in trials if trial.note.is_file() or trial.summary is not None]
        return run_trials(execute, trials, what)

    tasks = given.tasks.split(",")
    tuning = []
    for task in tasks:
        for label, one in bench.contenders.items():
            tuning += [bench.trial(label, task, bench.budget(task) / len(one.grid), 0, lr, True) for lr in one.grid]
    tuned = chosen(done(tuning, "learning rates"))
    runs: dict[tuple[str, str, int], Run] = {}
    for seed in range(given.seeds):
        trials = []
        for task in tasks:
            for label, one in bench.contenders.items():
                trial = tuned.get((task, label))
                if trial or not one.grid:
                    trials.append(bench.trial(label, task, bench.budget(task), seed, trial.point["lr"] if trial else None))
        for run in done(trials, f"seed {seed}"):
            runs[run.cell.task, run.contender, run.seed] = run
    rows = [row for task in tasks for row in rows_of(bench, task, tuned, runs)]
    units = {task: bench.whole(task) for task in tasks}
    figures = {"budget": given.budget, "unit": given.unit, "seconds of a whole pass": units, "rows": rows}
    write_json(bench.folder / "table.json", figures)
    print_table(f"dev loss at the cost of {given.budget:g} {given.unit} of the whole model on one thread", rows)
    print("seconds of a whole pass: " + ", ".join(f"{task} {seconds:.2f}" for task, seconds in units.items()))


if __name__ == "__main__":
    main()
