"""``l2l plan``: choose a tuner's training plan (:mod:`l2l.tuners.plan`) by runs on pool tasks, at equal cost.

A budget is counted in forward passes of the whole model, or in seconds. A pass over the top layers alone costs less, as is
measured first, so such a candidate takes more steps; the hidden states that it keeps are paid from the budget too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time
from typing import Any, Literal, TypeAlias, final

import torch

from l2l.arguments import Arguments
from l2l.estimators import finite_loss
from l2l.experiments.runner import Executor, Trial, digest, executor_of, experiment_inputs, run_trials
from l2l.experiments.spec import check_distinct, freeze
from l2l.experiments.stats import Cell, Curve, Run, mean_by_x
from l2l.experiments.tables import draw_curves, finite
from l2l.meta.config import task_list
from l2l.methods.base import check_counts, check_positive
from l2l.methods.registry import takes_tuner
from l2l.models.load import EMBEDDED, load_model
from l2l.models.prefix import TrainLayers, plan_fills, same_layers
from l2l.report.console import print_table
from l2l.report.run_directory import METRICS, RunDirectory, read_metrics, write_json
from l2l.tasks import get_task
from l2l.tasks.tiny_world import HELD_OUT, POOL
from l2l.train.config import OPEN, CompleteConfig, FineTuneConfig
from l2l.train.inputs import NAMES, Closures, load_run_inputs, tuner_fingerprint
from l2l.train.trainer import prepare_fine_tuning
from l2l.tuners import Depth, Provenance, TrainingPlan, Tuner
from l2l.tuners.plan import options_line, plan_config, plan_line

COSTS, PICTURE, TUNER = "costs.json", "plan.png", "tuner"
FRESH = "fresh"
TIMED = 3
"""Steps of which the shortest passes count: other work of the machine only makes a pass longer."""
Scores: TypeAlias = Mapping[str, float]
"""Label -> :func:`scores_of` at a budget; a label that was dropped is absent."""


@dataclass(frozen=True)
class PlanConfig(Arguments):
    """Choose a tuner's training plan: method, step size, batch and layers to train by budget, on tasks of its pool."""

    tuner: str = "l2l-tiny"
    """Directory, bundled name or hub id; or ``fresh``: a table of the model's blocks whose sigma is 1, MeZO's. It is left as it
    is: the one with the plan is written to ``out/tuner``."""
    extend: bool = False
    """Keep the plan that the tuner has, and add what is best at the candidates' layers as options for users who set these."""
    model: str = "l2l/tiny"
    """``l2l/tiny``, a directory, or a hub id."""
    tasks: list[str] | str = field(default_factory=list)
    """Pool tasks: a list, or names separated by commas. Empty, for the embedded model only: its own pool."""
    held_out: list[str] | str = field(default_factory=list)
    """Tasks to judge tuners on, which are refused here. Those of the embedded model are always."""
    data_dir: str | None = None
    """Holds ``<task>/{train,validation}.jsonl``; embedded tasks need none."""
    out: str = "runs/plan"
    """Directory of the tuner and of everything else. The same command again continues an interrupted run."""
    candidates: list[dict[str, Any]] = field(default_factory=lambda: [{"method": "learned", "lr": "auto"}])
    """Options of ``l2l fine-tune`` that a plan may hold; what one leaves open has its default."""
    depths: list[str] = field(default_factory=lambda: ["top:1/3", "all"])
    """Values of ``train_layers`` to try with every candidate that has none of its own."""
    controls: list[dict[str, Any]] = field(default_factory=lambda: [{"method": "mezo", "lr": "auto"}, {"method": "rsgn"}])
    """Default constants that the plan should beat, on all layers unless they say otherwise; never chosen, never dropped."""
    budgets: list[float] = field(default_factory=lambda: [200.0, 800.0])
    """Budgets of the runs, ascending, of which the plan chooses the depth for each."""
    unit: Literal["passes", "seconds"] = "passes"
    """Of the budgets: forward passes of the whole model over ``batch_size`` examples, or seconds."""
    screen: float = 0.25
    """Share of a budget after which, on the first seed, the worse half of the candidates is dropped, for larger budgets too
    those of which no depth is left; 0: none is."""
    seeds: int = 1
    """Runs per candidate, task and budget."""
    batch_size: int = 16
    """Examples of a pass in which budgets are counted, and per step of candidates that have no other number."""
    train_size: int = 1000
    """Rows to train on."""
    dev_size: int = 200
    """Rows by whose loss candidates are compared."""
    evaluations: int = 4
    """On dev, per run; the lowest loss counts, as it does for a user, who gets the weights of that step."""
    max_length: int | None = None
    """Most tokens per row; None: the model's context, at most 2048."""
    processes: int = 1
    """Runs at a time, one thread each."""
    overwrite: bool = False
    """Remove what an earlier run left in ``out``."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("seeds", "batch_size", "train_size", "dev_size", "evaluations", "processes")
        check_counts(**{name: getattr(self, name) for name in names})
        check_distinct("task", self.pool)
        held_out = {*task_list(self.held_out), *HELD_OUT}
        for task in self.pool:
            if {task, get_task(task).name} & held_out:
                raise ValueError(f"task {task!r} is held out: choose plans on tasks of the pool, and judge them on others")
        check_distinct("budget", list(map(str, self.budgets)))
        check_positive(budgets=min(self.budgets))
        if sorted(self.budgets) != self.budgets:
            raise ValueError(f"budgets={self.budgets} must ascend")
        if not 0 <= self.screen < 1:
            raise ValueError(f"screen={self.screen} must be at least 0 and below 1: a share of the budget, or 0 to drop none")
        for given in (*self.candidates, *self.controls):
            if unknown := sorted(given.keys() - set(OPEN)):
                raise ValueError(f"a candidate has {unknown[0]!r}; a plan holds {', '.join(OPEN)}")
            if "method" not in given:
                raise ValueError(f"candidate {given} names no method: give it one, as learned or learned+rsgn")
        check_distinct("candidate", [one.label for one in self.contenders])

    @property
    def pool(self) -> list[str]:
        """The tasks, in order."""
        return task_list(self.tasks) or (list(POOL) if self.model == EMBEDDED else [])

    @property
    def contenders(self) -> "list[Candidate]":
        """Every candidate at every depth, and the controls."""
        found = [Candidate(given, layers) for given in self.candidates for layers in self._depths(given)]
        return found + [Candidate(given, given.get("train_layers", "all"), control=True) for given in self.controls]

    def _depths(self, given: Mapping[str, Any]) -> Sequence[TrainLayers]:
        return [given["train_layers"]] if "train_layers" in given else self.depths


@final
@dataclass(frozen=True)
class Candidate:
    """Options of runs, and the layers that they train."""

    given: Mapping[str, Any]
    train_layers: TrainLayers
    control: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """The options without the layers."""
        return {name: value for name, value in self.given.items() if name != "train_layers"}

    @property
    def label(self) -> str:
        """Its name in tables."""
        kind = "control: " if self.control else ""
        return kind + options_line(self.recipe | {"train_layers": self.train_layers}).removeprefix("method ")

    def run(self, config: PlanConfig, tuner: str) -> CompleteConfig:
        """Its run on the first task, whose end is still open."""
        shared = {name: getattr(config, name) for name in ("model", "data_dir", "max_length", "train_size", "dev_size")}
        options = {"batch_size": config.batch_size, **self.recipe, "train_layers": self.train_layers}
        own = tuner if takes_tuner(self.recipe["method"]) else None
        rest = {"task": config.pool[0], "test_size": config.dev_size, "tuner": own, "progress": False}
        return FineTuneConfig(**shared, **options, **rest).completed()


@final
@dataclass(frozen=True)
class Cost:
    """What a candidate's run costs, in forward passes of the whole model over the batch of a :class:`PlanConfig`."""

    per_pass: float
    states: float
    """To compute the hidden states that it keeps of all train rows."""
    passes: float
    """Of its own, per step."""
    epoch: float
    """Passes of its own until every train row has come; by then all states are computed."""

    def spent(self, passes: float) -> float:
        """Cost of a run of so many passes of its own."""
        return passes * self.per_pass + min(1.0, passes / self.epoch) * self.states

    def limit(self, budget: float) -> int:
        """Most passes of its own whose cost is within a budget: the inverse of :meth:`spent`, rounded down."""
        return math.floor(max(budget / (self.per_pass + self.states / self.epoch), (budget - self.states) / self.per_pass))


def measure_costs(config: PlanConfig, tuner: str) -> tuple[float, dict[str, Cost]]:
    """Seconds of a pass over the whole model, and the cost of every contender by its label.

    Every contender is set up as in its runs, so that one that cannot run is refused here; nothing is written.
    """
    seconds: dict[tuple[Any, ...], float] = {}  # of a pass, by all that it depends on
    found: dict[str, tuple[float, bool, float]] = {}  # by label: of a pass, whether states are kept, and passes per step
    unit_run = Candidate({"method": "mezo", "lr": "auto"}, "all")
    for one in (unit_run, *config.contenders):
        run = one.run(config, tuner)
        context = prepare_fine_tuning(replace(run, train_size=min(config.train_size, 4 * run.batch_size)))
        closures, passes = context.closures, context.optimizer.method.passes
        cache = None if context.prefix is None else context.prefix.cache
        whole = getattr(context.optimizer.method, "whole_passes", passes)
        at = str(one.train_layers), run.batch_size, closures.outputs, closures.near and (passes, whole)
        if at not in seconds:
            with nullcontext() if cache is None else cache.attached():
                if cache is not None:
                    for fill in plan_fills(context.model, closures.fed(0)):
                        cache.keep(fill, cache.compute(fill))
                seconds[at] = pass_seconds(closures, 0, passes, whole, context.model.device)
        found[one.label] = seconds[at], cache is not None, passes
    unit = found[unit_run.label][0]
    costs = {}
    for one in config.contenders:
        size = one.run(config, tuner).batch_size
        taken, kept, passes = found[one.label]
        whole_rows, epoch = size / config.batch_size, config.train_size / size
        per_pass = min(taken / unit, max(1.0, whole_rows))  # no part of the model costs more than the whole: that is noise
        left_out = max(0.0, whole_rows - per_pass) if kept else 0.0  # of a pass; paid once for every row
        costs[one.label] = Cost(per_pass, epoch * left_out, passes, epoch * passes)
    return unit, costs


def check_budgets(smallest: Mapping[str, float], costs: Mapping[str, Cost]) -> None:
    """Raise ValueError where a contender's smallest budget, in whole passes, does not pay for a step."""
    for label, cost in costs.items():
        if cost.limit(smallest[label]) < cost.passes:
            raise ValueError(
                f"candidate {label!r} takes {cost.spent(cost.passes):.1f} whole passes per step, and its smallest run has a "
                f"budget of {smallest[label]:g}: raise budgets or screen"
            )


def pass_seconds(closures: Closures, step: int, passes: float, whole: float, device: torch.device) -> float:
    """Mean over a step's passes, of which the first may cost more than those that go on from it, and these more than those that
    share its states: each the shortest of several. On the CPU, where the runs have one thread, by its own clock: other work of
    the machine does not count.

    Args:
        whole: number of the passes that run all layers, the first one among them, where the others share states with it.
    """
    clock = thread_time if device.type == "cpu" else perf_counter

    def first_and_second(made: Closures) -> tuple[float, float]:
        closure, times = made.at(step), [clock()]
        for _ in range(2):
            finite_loss(closure)
            times.append(clock())
        return times[1] - times[0], times[2] - times[1]

    shared = [first_and_second(closures) for _ in range(TIMED)]
    alone = replace(closures, states=None, head_displaced=None)
    unshared = shared if closures.states is None else [first_and_second(alone) for _ in range(TIMED)]
    first, sharing = map(min, zip(*shared, strict=True))
    further = min(second for _, second in unshared)
    return (first + (whole - 1) * further + (passes - whole) * sharing) / passes


# Scores and the choice: pure functions.


def scores_of(losses: Mapping[str, Sequence[float]], initial: Sequence[float]) -> dict[str, float]:
    """Label -> share of the reachable gain that is left: mean over runs of (loss - best) / (initial - best).

    0 is the best of all everywhere, 1 no gain. A share, as losses of tasks differ in size; and no rank, which would count a
    difference of no use like one of half the gain. Runs in which nobody gains tell nothing, and are left out.

    Args:
        losses: dev loss of each run (task and seed), infinite where it diverged.
        initial: of the untrained model, in the same order.

    Raises:
        ValueError: nobody gains anywhere.
    """
    best = [min(column) for column in zip(*losses.values(), strict=True)]
    told = [i for i, loss in enumerate(best) if loss < initial[i]]
    if not told:
        raise ValueError("no candidate lowered a dev loss: give larger budgets, or other candidates")
    return {label: fmean((own[i] - best[i]) / (initial[i] - best[i]) for i in told) for label, own in losses.items()}


def better_half(candidates: Sequence[Candidate], scores: Scores) -> list[Candidate]:
    """The half, rounded up, of lowest score, in their order."""
    kept = sorted(candidates, key=lambda one: scores[one.label])[: (len(candidates) + 1) // 2]
    return [one for one in candidates if one in kept]


def choose_plan(
    candidates: Sequence[Candidate], scores: Mapping[float, Scores], batch_size: int
) -> tuple[TrainingPlan, dict[float, float]]:
    """The plan of the recipe whose best depths have the lowest mean score over the budgets, with these depths; its scores.

    Args:
        scores: by budget in whole passes. Between two of them, the depth changes at their geometric mean.

    Raises:
        ValueError: no recipe has a finite score at every budget.
    """
    budgets, found = sorted(scores), []
    for recipe in {options_line(one.recipe): one.recipe for one in candidates}.values():
        own = [one for one in candidates if one.recipe == recipe]
        best = [min(own, key=lambda one, at=at: scores[at].get(one.label, math.inf)) for at in budgets]
        found.append((fmean(scores[at].get(one.label, math.inf) for at, one in zip(budgets, best, strict=True)), recipe, best))
    score, recipe, best = min(found, key=lambda one: one[0])
    if not math.isfinite(score):
        raise ValueError("no candidate has runs that ended at every budget: set screen to 0, or give other candidates")
    starts = [0.0, *(round(math.sqrt(low * high), 1) for low, high in pairwise(budgets))]
    depths = [Depth(start, one.train_layers) for start, one in zip(starts, best, strict=True)]
    kept = [depth for i, depth in enumerate(depths) if i == 0 or depth.train_layers != depths[i - 1].train_layers]
    own = {at: scores[at][one.label] for at, one in zip(budgets, best, strict=True)}
    plan = TrainingPlan(**{"batch_size": batch_size, **recipe}, depths=kept)
    return replace(plan, layer_options=layer_options(plan, candidates, scores)), own


def layer_options(
    plan: TrainingPlan, candidates: Sequence[Candidate], scores: Mapping[float, Scores]
) -> dict[str, dict[str, Any]]:
    """For every depth that the plan does not choose: what is other in the recipe of lowest mean score there, of those with the
    plan's method and batch size."""
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for one in candidates:
        score = fmean(own.get(one.label, math.inf) for own in scores.values())
        other = TrainingPlan(**{"batch_size": plan.batch_size, **one.recipe})
        alike = (other.method, other.batch_size) == (plan.method, plan.batch_size)
        chosen = any(same_layers(one.train_layers, depth.train_layers) for depth in plan.depths)
        if alike and not chosen and score < found.get(str(one.train_layers), (math.inf,))[0]:
            found[str(one.train_layers)] = score, other.options

    def changed(options: Mapping[str, Any]) -> dict[str, Any]:
        names = sorted(options.keys() | plan.options.keys())
        return {name: options.get(name) for name in names if options.get(name) != plan.options.get(name)}

    return {layers: own for layers, (_, options) in found.items() if (own := changed(options))}


# The runs.


@final
@dataclass(frozen=True)
class Planner:
    """Runs contenders at budgets, and scores them."""

    config: PlanConfig
    tuner: str
    runs: Path
    executor: Executor
    unit: float
    """Seconds of a pass over the whole model."""
    costs: Mapping[str, Cost]
    inputs: Mapping[str, Any]
    """Task -> fingerprint of what its runs read."""

    def trial(self, one: Candidate, task: str, seed: int, budget: float) -> Trial:
        """A run at a budget in whole passes."""
        cost, config = self.costs[one.label], self.config
        limit = cost.limit(budget)
        run = replace(one.run(config, self.tuner), task=task, seed=seed)
        names = (*OPEN, "model", "data_dir", "max_length", "train_size", "dev_size", "test_size", "task", "seed", "tuner")
        every = max(1, math.ceil(limit / cost.passes / config.evaluations))
        options = {name: getattr(run, name) for name in names} | {"eval_every": every, "checkpoint_every": every}
        seconds = limit * cost.per_pass * self.unit
        options |= {"max_passes": limit} if config.unit == "passes" else {"max_seconds": seconds}
        out = str(self.runs / f"{Path(task).stem}-{run.method}-s{seed}-{digest(options, self.inputs[task])}")
        head = (Cell("plan", run.scheme, task), run.model, one.label, "", run.method, run.tuner, seed, True, {"lr": run.lr})
        return Trial(Run(*head, folder=out), options, out)

    def scores(
        self, contenders: Sequence[Candidate], budget: float, seeds: int, what: str
    ) -> tuple[dict[str, float], list[Run]]:
        """Score of each at a budget, and the runs."""
        cells = [(task, seed) for task in self.config.pool for seed in range(seeds)]
        trials = [self.trial(one, *cell, budget) for one in contenders for cell in cells]
        runs = run_trials(self.executor, trials, what, self.config.progress)
        initial = [math.nan] * len(cells)
        for i, (trial, run) in enumerate(zip(trials, runs, strict=True)):
            if not run.diverged and trial.summary is not None:
                initial[i % len(cells)] = trial.summary["initial_dev_loss"]
        losses: dict[str, list[float]] = {}
        for run in runs:
            losses.setdefault(run.contender, []).append(run.best_dev_loss)
        return scores_of(losses, initial), runs


def read_inputs(config: PlanConfig) -> dict[str, Any]:
    """Task -> fingerprint of what its runs read."""
    found: dict[str, Any] = {}
    model = tokenizer = known = None
    for task in config.pool:
        run = replace(Candidate({"method": "mezo", "lr": "auto"}, "all").run(config, config.tuner), task=task)
        inputs = load_run_inputs(run, model, tokenizer)
        model, tokenizer = inputs.model, inputs.tokenizer
        known = found[task] = experiment_inputs(inputs, known)
    return found


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Choose the plan and write the tuner with it; what ``summary.json`` holds.

    Raises:
        ValueError, FileNotFoundError: bad input, before anything is written; or no candidate is of use.
    """
    torch.set_num_threads(1)  # the runs share the processors
    executor = executor_of("local", config.processes)
    with RunDirectory(config.out, asdict(config), config.overwrite, NAMES) as folder:
        return _plan(config, executor, folder)


def extended_plan(config: PlanConfig) -> TrainingPlan | None:
    """The plan that is kept; None where a new one is made.

    Raises:
        ValueError: there is none, or a candidate could not be added to it.
    """
    if not config.extend:
        return None
    plan = None if config.tuner == FRESH else Tuner.from_pretrained(config.tuner).plan
    if plan is None:
        raise ValueError(f"extend keeps the plan that a tuner has, and tuner {config.tuner!r} has none: leave extend out")
    for one in config.contenders:
        own = TrainingPlan(**{"batch_size": config.batch_size, **one.recipe})
        if not one.control and (own.method, own.batch_size) != (plan.method, plan.batch_size):
            raise ValueError(
                f"candidate {one.label!r} cannot be added to a plan whose method {plan.method!r} and batch_size "
                f"{plan.batch_size} hold for all layers: give it both, or leave extend out"
            )
        if not one.control and any(same_layers(one.train_layers, depth.train_layers) for depth in plan.depths):
            raise ValueError(
                f"candidate {one.label!r} trains layers that the plan chooses itself: give it other layers, or leave extend out"
            )
    return plan


def base_tuner(config: PlanConfig) -> Tuner:
    """The tuner that gets the plan, without one."""
    if config.tuner != FRESH:
        return Tuner.from_pretrained(config.tuner).with_plan(None)
    return Tuner.for_model(load_model(config.model), "table", provenance=Provenance(config.model), start="mezo")


def _plan(config: PlanConfig, executor: Executor, folder: RunDirectory) -> dict[str, Any]:
    recorded = folder.path / COSTS
    known = json.loads(recorded.read_text()) if recorded.is_file() and not config.overwrite else None
    before, tuner = extended_plan(config), base_tuner(config)
    if known is None:
        with TemporaryDirectory() as temporary:
            unit, costs = measure_costs(config, str(tuner.save_pretrained(Path(temporary) / TUNER)))
    else:
        unit, costs = _known_costs(known)
    budgets = [given if config.unit == "passes" else given / unit for given in config.budgets]
    screened = config.screen or 1.0
    check_budgets({one.label: budgets[0] * (1.0 if one.control else screened) for one in config.contenders}, costs)
    read = read_inputs(config)
    named = {f"task {i}": one for i, one in enumerate(read.values())} | {"tuner": tuner_fingerprint(tuner)}
    runs = folder.identify(named, always=True).create().path / "runs"
    write_json(folder.path / COSTS, {"whole_pass_seconds": unit, "costs": {name: vars(cost) for name, cost in costs.items()}})
    planner = Planner(config, str(freeze(tuner, runs / "_tuners")), runs, executor, unit, costs, read)
    candidates = left = [one for one in config.contenders if not one.control]
    controls = [one for one in config.contenders if one.control]
    found: dict[float, dict[str, float]] = {}
    done: list[Run] = []
    for given, budget in zip(config.budgets, budgets, strict=True):
        kept = left
        if config.screen and len(left) > 1:
            early, _ = planner.scores(left, screened * budget, 1, f"screening for {given:g} {config.unit}")
            kept = better_half(left, early)
        found[budget], done = planner.scores([*kept, *controls], budget, config.seeds, f"runs of {given:g} {config.unit}")
        recipes = [one.recipe for one in kept]
        left = [one for one in left if one.recipe in recipes]  # the plan's recipe has runs at every budget
    plan, own = choose_plan(candidates, found, config.batch_size)
    chosen_on, evidence_of = config.pool, "plan"
    if before is not None:
        plan = replace(before, layer_options={**before.layer_options, **layer_options(before, candidates, found)})
        chosen_on = list(dict.fromkeys([*tuner.provenance.recipe.get("plan_tasks", ()), *config.pool]))
        evidence_of = f"plan of {', '.join(sorted({str(one.train_layers) for one in candidates}))}"
    beaten = {one.label: all(own[budget] < scores[one.label] for budget, scores in found.items()) for one in controls}
    evidence = {
        **{"tasks": config.pool, "seeds": config.seeds, "train_size": config.train_size, "whole_pass_seconds": unit},
        "score": "share of the reachable gain in dev loss that is left, mean over tasks and seeds",
        "scores": {f"{budget:g}": {**scores, "plan": own[budget]} for budget, scores in found.items()},
        "cost_of_a_pass": {label: cost.per_pass for label, cost in costs.items()},
        "beats": [label for label, better in beaten.items() if better],
        "does_not_beat": [label for label, better in beaten.items() if not better],
    }
    origin = replace(
        tuner.provenance,
        recipe=tuner.provenance.recipe | {"plan_tasks": chosen_on},
        results=tuner.provenance.results | {evidence_of: finite(evidence)},
    )
    saved = replace(tuner, plan=plan, provenance=origin).save_pretrained(folder.path / TUNER)
    draw(folder.path / PICTURE, done, costs)
    summary = {"plan": plan_config(plan), **evidence, "tuner": str(saved), "config": asdict(config)}
    folder.finish(finite(summary))
    rows = [
        {"candidate": label, "a pass costs": costs[label].per_pass}
        | {f"at {budget:g} passes": scores.get(label, "dropped") for budget, scores in found.items()}
        for label in costs
    ]
    print_table("share of the gain left, at budgets in passes of the whole model", rows)
    print(f"plan: {plan_line(plan)}")
    for verdict in ("beats", "does_not_beat"):
        print(f"{verdict.replace('_', ' ')}: {'; '.join(evidence[verdict]) or 'none of the controls'}")
    print(f"tuner: {saved}")
    return summary


def _known_costs(known: Mapping[str, Any]) -> tuple[float, dict[str, Cost]]:
    return known["whole_pass_seconds"], {label: Cost(**cost) for label, cost in known["costs"].items()}


def draw(target: Path, runs: Sequence[Run], costs: Mapping[str, Cost]) -> Path:
    """A panel per task: dev loss of each contender against what its runs had cost by then, in passes of the whole model."""
    panels: dict[str, dict[str, Curve]] = {}
    for label, task in dict.fromkeys((run.contender, run.cell.task) for run in runs):
        own = [run for run in runs if (run.contender, run.cell.task) == (label, task) and not run.diverged]
        rows = [row for run in own for row in read_metrics(Path(run.folder) / METRICS) if row["dev_loss"]]
        points = [(costs[label].spent(float(row["passes"])), float(row["dev_loss"])) for row in rows]
        panels.setdefault(task, {})[label] = mean_by_x(points)
    labels = list(dict.fromkeys(run.contender for run in runs))
    return draw_curves(target, panels, labels, "cost in passes of the whole model", "dev loss (nats), mean over seeds")
