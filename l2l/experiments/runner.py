"""Executes an experiment: checks it, plans its trials, runs those that are missing, and reads their results.

What can be refused is refused before anything is written, in one line: every method is built on every model under every
scheme, on its data; a method that is refused on some models or schemes is left out of these.

Every run has a folder named by a hash of everything that decides its result, so that no run is repeated and an interrupted
experiment continues. Executors run trials in processes of this machine or in a Ray cluster, one thread each.
"""

import hashlib
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from math import ceil
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias

import torch

from l2l.experiments.spec import Contender, Entry, ExecutorName, ExperimentConfig, MethodCosts, Place, SchemeEntry, Setting
from l2l.experiments.stats import Cell, Point, Run, choose, point_size
from l2l.methods import method_class
from l2l.methods.registry import build_method, with_estimator
from l2l.models.load import context_length
from l2l.optim import ZOOptimizer
from l2l.params import Blocks
from l2l.report.console import progress_bar
from l2l.report.run_directory import METRICS, SUMMARY, RunDirectory, locked, read_metrics, write_json
from l2l.tasks import inspect as inspect_task
from l2l.train import cluster, runlog
from l2l.train.config import DEV_ROWS, EVAL_EVERY, TEST_ROWS, FineTuneConfig
from l2l.train.inputs import NAMES, RunInputs, files_fingerprint, load_run_inputs, model_fingerprint, rows_fingerprint
from l2l.train.trainer import fine_tune, fitting_tuner, setup_scheme
from l2l.train.workers import end_with_parent
from l2l.tuners.api import Tuner


def check_all(config: ExperimentConfig, contenders: Sequence[Contender], held_out: bool = True) -> list[Place]:
    """Load every model and build every method on it under every scheme.

    ``held_out`` leaves out a tuner in settings with a task that it has learned from. ValueError or FileNotFoundError for
    a model, task or data that cannot be had, an unknown method, or one that can take part nowhere.
    """
    for one in contenders:
        if re.fullmatch(r"[\w.]+", one.method):  # the parts of composed names (a+b) are checked where they are built
            method_class(one.method)
    pairs = product(config.settings, config.tuning_schemes)
    places = [check_place(config, setting, scheme, contenders, held_out) for setting, scheme in pairs]
    for one in contenders:
        reasons = [place.left_out.get(one.label) for place in places]
        if all(reasons):
            raise ValueError(f"method {one.label!r} can take part nowhere: {reasons[0]}; mend it, or leave it out")
    return places


def check_place(
    config: ExperimentConfig, setting: Setting, scheme: SchemeEntry, contenders: Sequence[Contender], held_out: bool
) -> Place:
    """One place of :func:`check_all`; the rows of all tasks are read, so that missing or malformed data are refused here."""
    options = config.run_options(setting, scheme)
    configs = [FineTuneConfig(**{**options, "task": task}).completed() for task in setting.tasks]
    first = load_run_inputs(configs[0])
    limit, read = context_length(first.model, setting.max_length), dict[str, dict[str, Any]]()
    for number, (task, other) in enumerate(zip(setting.tasks, configs, strict=True)):
        inputs = load_run_inputs(other, first.model, first.tokenizer) if number else first
        read[task] = experiment_inputs(inputs, read.get(setting.tasks[0]))
        if scheme == config.tuning_schemes[0]:  # once for all of them
            inspect_task.warn_of_problems(inputs.task, inputs.splits, first.tokenizer, limit, first.model)
    model = setup_scheme(first.model, configs[0])
    model.eval()
    blocks = Blocks.of(model)
    entries: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for one in contenders:
        try:
            tuner = _load_tuner(setting, one, held_out)
            given = options | one.options | {"method": one.method, "method_args": one.method_args}
            built = [FineTuneConfig(**given | dict(point)).completed() for point in config.points(setting, scheme, one)]
            fitting = fitting_tuner(tuner, model, scheme.name)
            method = build_method(one.method, built[0].epsilon, one.method_args, fitting, model, built[0].steps)
            method = with_estimator(method, built[0].estimator, built[0].num_directions)
            for run in built:  # an optimizer at each of its points can refuse, as in a run
                same = {name: getattr(run, name) for name in ("weight_decay", "perturb", "update", "sparse_embeddings")}
                ZOOptimizer(model, method, run.lr, curvature_lr=run.curvature_lr(), **same)
        except ValueError as error:
            left_out[one.label] = " ".join(str(error).split())
            continue
        planned = _has_horizon(method) and "max_passes" in options
        steps = ceil(options["max_passes"] / method.passes) if planned else None
        many = "max_passes" in options and method.passes > 2
        every = max(1, int(options["max_passes"] / config.evaluations / method.passes)) if many else None
        costs = MethodCosts.of(method, blocks)
        entries[one.label] = Entry(one, dict.fromkeys(setting.tasks, tuner), steps, costs, every)
    return Place(setting, scheme, entries, left_out, read)


def experiment_inputs(inputs: RunInputs, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fingerprint of what the runs of a task read, whatever their seeds: its files, and a sample of its rows, rendered.

    Args:
        known: that of another task on the same model, which is not read again.
    """
    task, splits = inputs.task, inputs.splits
    found = {"task": task.label, "files": files_fingerprint(task, inputs.config.data_dir)}
    found |= {f"{kind} rows": rows_fingerprint(task, getattr(splits, kind)) for kind in ("train", "dev", "test")}
    of_model = known or model_fingerprint(inputs.model, inputs.tokenizer)
    return found | {name: of_model[name] for name in ("model", "tokenizer")}


def check_folder(config: ExperimentConfig, again: bool = False) -> RunDirectory:
    """The directory of an experiment as it is; ValueError where it cannot serve. Nothing is written or locked.

    Args:
        again: whether a finished experiment may be taken up again.
    """
    return RunDirectory(config.out, config.recorded, config.overwrite, NAMES, again=again)


@contextmanager
def experiment_folder(
    config: ExperimentConfig, places: Sequence[Place], again: bool = False
) -> Iterator[tuple[RunDirectory, Path]]:
    """The directory of an experiment and that of its runs, made; no other process writes into them inside.

    Args:
        again: whether a finished experiment may be taken up again.

    Raises:
        ValueError: there is another experiment, or one on other models or rows, which are named; nothing is written.
        BlockingIOError: another process is at work in one of them.
    """
    with check_folder(config, again) as folder:
        runs = Path(config.runs) if config.runs else folder.path / "runs"
        if runs.exists() and not runs.is_dir():
            raise ValueError(f"runs={config.runs!r} is not a directory: choose another, or leave it out")
        # Alike under all schemes; tasks by their place, as files are named by where they lie.
        read = {place.setting.name: {f"task {i}": one for i, one in enumerate(place.inputs.values())} for place in places}
        folder.identify(read, always=True).create()
        with locked(runs):
            yield folder, runs


def _load_tuner(setting: Setting, contender: Contender, held_out: bool) -> Tuner | None:
    name = contender.tuner_for(setting.name)
    if name is None:
        return None
    tuner, learned = Tuner.from_pretrained(name), []
    for recorded in ("tasks", "validation_tasks", "plan_tasks"):  # in the recipe: what it has learned from, or was chosen by
        tasks = tuner.provenance.recipe.get(recorded) or []
        learned += [task.strip() for task in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    for task in setting.tasks if held_out else ():
        if task in learned:
            raise ValueError(
                f"tuner {name!r} of contender {contender.label!r} has learned from task {task!r} of setting "
                f"{setting.name!r}: compare it on tasks that took no part in making it"
            )
    return tuner


def _has_horizon(method: Any) -> bool:
    """Whether the method, or one that it wraps, plans for a number of steps."""
    inner = getattr(method, "inner", None)
    return getattr(method, "horizon", None) is not None or (inner is not None and _has_horizon(inner))


@dataclass(frozen=True)
class Trial:
    """A run to do."""

    head: Run  # the run's identity, its results still empty
    options: dict[str, Any]  # fields of :class:`FineTuneConfig`, ``out`` apart
    out: str  # folder of the run

    @property
    def note(self) -> Path:
        """Written beside the folder of a run that diverged."""
        return Path(f"{self.out}.diverged.json")

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of the same run where it was done before; None where it was not."""
        path = Path(self.out) / SUMMARY
        found = json.loads(path.read_text()) if path.is_file() else None
        decided = {name: value for name, value in self.options.items() if name not in NAMES}  # those are in the folder's name
        return found if found and decided.items() <= found["config"].items() else None


def digest(options: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Hash of everything that decides a run's result.

    Options at their defaults are left out, so that naming a default gives the same hash. A method defined outside the
    package is identified by the content of its file, which no version number covers; model and rows by theirs, not by where
    they lie.

    Args:
        inputs: fingerprint of what the run reads (:func:`experiment_inputs`).
    """
    always = {name: options[name] for name in ("task", "method", "tuner", "lr", "seed")}
    decided = {"l2l": version("l2l"), "torch": version("torch"), **non_default_options(options), **always}
    decided = {name: value for name, value in decided.items() if name not in NAMES} | {"inputs": inputs}
    if options["tuner"] is not None:
        decided["tuner"] = Path(options["tuner"]).name  # the hash of its content: see freeze
    paths = [inspect.getfile(method_class(part)) for part in options["method"].split("+") if "." in part]
    if paths:
        content = b"".join(Path(path).read_bytes() for path in paths)
        decided["source"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return hashlib.blake2b(json.dumps(decided, sort_keys=True).encode(), digest_size=6).hexdigest()


def non_default_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run that differ from their defaults."""
    # Sizes that an experiment gives are never open; the largest that are chosen where they are count as the defaults.
    defaults = FineTuneConfig(dev_size=DEV_ROWS, test_size=TEST_ROWS, eval_every=EVAL_EVERY)
    return {name: value for name, value in options.items() if value != getattr(defaults, name)}


def run_trial(trial: Trial) -> "Record":
    """Run a trial unless it was done; its ``final_loss``, and ``refused``: why bad input was not run, or nothing."""
    try:
        if not trial.note.is_file():
            return {"final_loss": execute(trial)["final_loss"], "refused": ""}
    except FloatingPointError as error:  # such a learning rate is a bad one, not an error
        write_json(trial.note, {"diverged": str(error)})
    except (ValueError, FileNotFoundError) as error:
        return {"final_loss": float("inf"), "refused": " ".join(str(error).split())}
    return {"final_loss": float("inf"), "refused": ""}


def execute(trial: Trial) -> dict[str, Any]:
    """Fine-tune as the trial says, unless that was done; the summary."""
    given = trial.options | {"out": trial.out, "overwrite": True, "progress": False, "save": "log"}
    said, inspect_task.logger.disabled = inspect_task.logger.disabled, True  # by check_place, once for all trials
    try:
        return trial.summary or fine_tune(**given).summary
    finally:
        inspect_task.logger.disabled = said


def read_run(trial: Trial) -> Run:
    """The result of a trial, with its curve where it is of the table; ValueError where it is not done."""
    if trial.note.is_file():
        return replace(trial.head, diverged=True)
    summary, folder = trial.summary, Path(trial.out)
    if summary is None:
        raise ValueError(f"the run in {trial.out} is not done: run the same command again")
    return replace(
        trial.head,
        **{name: summary[name] for name in ("passes", "steps", "seconds", "initial_loss", "accuracy")},
        train_loss=summary["final_loss"],
        dev_loss=float([row["dev_loss"] for row in read_metrics(folder / METRICS) if row["dev_loss"]][-1]),
        test_loss=summary["last"]["test"]["loss"],
        best_dev_loss=summary["best"]["dev"]["loss"],
        best_accuracy=summary["best"]["test"]["value"],
        peak_bytes=summary["measured"]["peak_bytes"],
        curve=() if trial.head.tuning or not summary["steps"] else runlog.step_curve(folder),
    )


def run_summary(run: Run) -> dict[str, Any]:
    """A run as the summaries of ``l2l quickstart`` and ``l2l tuners test`` list it."""
    return {
        "task": run.cell.task,
        "method": run.contender,
        "lr": run.point["lr"],
        **{name: getattr(run, name) for name in ("seed", "steps", "passes", "seconds")},
        "final_loss": run.train_loss,
        "accuracy": run.accuracy,
        "dev_loss": run.best_dev_loss,
        "test_loss": run.test_loss,
        "run": run.folder,
    }


Record: TypeAlias = dict[str, Any]
Executor: TypeAlias = Callable[[Sequence[Trial], Callable[[Record], None]], list[Record]]
"""Runs trials, in other processes; their records in the order of the trials. The function is called in this process with
each record as it arrives."""
Chosen: TypeAlias = dict[tuple[Cell, str], tuple[Point, Sequence[float]]]
"""(cell, contender) -> the point chosen, and the step sizes that it was chosen from."""


@dataclass(frozen=True)
class Runner:
    """Runs the trials of an experiment."""

    config: ExperimentConfig
    executor: Executor
    places: Sequence[Place]
    runs: Path
    refuse: bool = False  # whether a run that is refused is a result; otherwise its error is raised

    def tune(self) -> list[Run]:
        """The whole grid on the tuning seed, for every contender that has a choice."""
        trials = []
        for place in self.places:
            for cell, label in product(place.cells, place.entries):
                points = self.points(place, label)
                for point in points if len(points) > 1 else ():
                    trials.append(self.plan(place, cell, label, point, self.config.tuning_seed, True))
        return self.run(trials, "step sizes")

    def choose(self, tuning: Sequence[Run]) -> Chosen:
        """The point of lowest dev loss for each cell and contender; the only one where there is no choice."""
        tried: dict[tuple[Cell, str], list[Run]] = {}
        for run in tuning:
            tried.setdefault((run.cell, run.contender), []).append(run)
        found: Chosen = {}
        for place in self.places:
            for cell, label in product(place.cells, place.entries):
                points = self.points(place, label)
                point = choose(tried[cell, label]) if len(points) > 1 else points[0]
                found[cell, label] = point, [point_size(option) for option in points]
        return found

    def table(self, points: Mapping[tuple[Cell, str], Point]) -> list[Run]:
        """Every cell and contender at its point, over the seeds."""
        trials = [
            self.plan(place, cell, label, points[cell, label], seed, False)
            for place in self.places
            for seed, cell, label in product(range(self.config.seeds), place.cells, place.entries)
        ]
        return self.run(trials, "table")

    def points(self, place: Place, label: str) -> list[Point]:
        """The points among which a contender chooses."""
        return self.config.points(place.setting, place.scheme, place.entries[label].contender)

    def plan(self, place: Place, cell: Cell, label: str, point: Point, seed: int, tuning: bool) -> Trial:
        """The trial of a contender in a cell at a point. Trials with equal options share a folder."""
        entry = place.entries[label]
        given, tuner = entry.contender, entry.tuners[cell.task]
        options = self.config.run_options(place.setting, place.scheme) | given.options
        chosen = {"steps": entry.steps, "eval_every": entry.eval_every}
        options |= {name: value for name, value in chosen.items() if value is not None}
        options |= {"task": cell.task, "method": given.method, "method_args": given.method_args}
        options |= {"tuner": tuner, "seed": seed, **point}
        method = re.sub(r"[^\w.+-]", "_", given.method)
        name = f"{Path(cell.task).stem}-{cell.scheme}-{method}-s{seed}-{digest(options, place.inputs.get(cell.task, {}))}"
        out = str(self.runs / cell.setting / name)
        head = (cell, place.setting.model, label, given.role, given.method, tuner, seed, tuning, point)
        return Trial(Run(*head, folder=out), options, out)

    def run(self, trials: Sequence[Trial], what: str) -> list[Run]:
        """See :func:`run_trials`."""
        return run_trials(self.executor, trials, what, self.config.progress, self.refuse)


def run_trials(
    executor: Executor, trials: Sequence[Trial], what: str, progress: bool = True, refuse: bool = False
) -> list[Run]:
    """Run what is not done yet; the results of all, in order. Trials with the same folder run once.

    Args:
        refuse: whether a run that is refused is a result; otherwise its error is raised.
    """
    unique = {trial.out: trial for trial in trials}
    missing = [trial for trial in unique.values() if not trial.note.is_file() and trial.summary is None]
    if len(missing) < len(unique):
        print(f"continuing: {len(unique) - len(missing)} of {len(unique)} runs for the {what} are done")
    records: list[Record] = []
    if missing:
        with progress_bar(what, len(unique), len(unique) - len(missing), progress) as advance:

            def after_each(record: Record) -> None:
                if record["refused"] and not refuse:
                    raise ValueError(record["refused"])
                advance(record["final_loss"])

            records = executor(missing, after_each)
    refused = {trial.out: record["refused"] for trial, record in zip(missing, records, strict=True)}
    return [replace(trial.head, refused=reason) if (reason := refused.get(trial.out)) else read_run(trial) for trial in trials]


def executor_of(name: ExecutorName, processes: int, ray_address: str | None = None) -> Executor:
    """The executor of that name, with so many runs at a time.

    Args:
        ray_address: see :func:`l2l.train.cluster.connect`.

    Raises:
        ValueError: its package is not installed, or there is no cluster at the address.
    """
    if name == "local":
        return partial(run_locally, processes)
    return partial(run_on_ray, cluster.connect(ray_address, processes), processes)


def run_locally(processes: int, trials: Sequence[Trial], after_each: Callable[[Record], None]) -> list[Record]:
    """An executor: processes of this machine, one thread each; ValueError where one was killed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    records: dict[int, Record] = {}
    others = active_children()
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin_process) as pool:
        futures = {pool.submit(_run_in_process, trial): number for number, trial in enumerate(trials)}
        try:
            for future in as_completed(futures):
                records[futures[future]] = future.result()
                after_each(future.result())
        except BrokenProcessPool as error:
            raise ValueError(
                "a process ended in the middle of a run, for want of memory perhaps: the same command continues; with fewer "
                "--processes each has more"
            ) from error
        except BaseException as error:
            for worker in set(active_children()) - set(others) if isinstance(error, KeyboardInterrupt) else ():
                if worker.pid:  # a signal to this process alone has not reached it
                    os.kill(worker.pid, signal.SIGINT)
            pool.shutdown(cancel_futures=True)
            raise
    return [records[number] for number in range(len(trials))]


_leaving = Event()  # set in a worker that was interrupted: trials that it had already fetched do not begin


def _begin_process() -> None:
    def leave(*_: Any) -> None:  # Ctrl-C ends the run without a traceback; the parent reports it
        _leaving.set()
        sys.exit(130)

    signal.signal(signal.SIGINT, leave)
    end_with_parent()  # lest it writes beside the workers of the command run again


def _run_in_process(trial: Trial) -> Record:
    if _leaving.is_set():
        sys.exit(130)
    torch.set_num_threads(1)
    return run_trial(trial)


RETRIES = 3
"""How often a run is begun again, on another machine of the cluster, where the one that it was on is lost."""


def run_on_ray(ray: Any, processes: int, trials: Sequence[Trial], after_each: Callable[[Record], None]) -> list[Record]:
    """An executor: tasks of a Ray cluster, a processor each, and a GPU where a run's device is one. A run whose process or
    machine is lost begins anew elsewhere; ValueError where that has happened too often.

    The cluster's machines see the same files under the same paths, and have the same package.
    """
    remote = ray.remote(max_retries=RETRIES)(_run_on_a_machine)
    records: dict[int, Record] = {}
    waiting, running = list(range(len(trials))), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                number = waiting.pop(0)
                task = remote.options(**cluster.resources(trials[number].options.get("device")))
                running[task.remote(trials[number], os.getcwd())] = number
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            try:
                records[number] = cluster.result(ray, ready)
            except cluster.Lost as error:
                raise ValueError(
                    f"run {trials[number].out} was lost with its machine or process {RETRIES + 1} times ({error}): the same "
                    "command continues; where memory was short, fewer --processes leave more to each"
                ) from error
            after_each(records[number])
    finally:
        for unfinished in running:
            ray.cancel(unfinished)
    return [records[number] for number in range(len(trials))]


def _run_on_a_machine(trial: Trial, folder: str) -> Record:
    cluster.enter(folder)
    return _run_in_process(trial)
