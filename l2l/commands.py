"""The commands of ``l2l``: each one's configuration class, and what runs it. Imported only when it is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from l2l import tuner_commands as on_tuners


@dataclass(frozen=True)
class Command:
    """A command: its configuration class, and what runs it."""

    path: str
    help: str
    config: Callable[[], type]
    run: Callable[[Any], None]


def _fine_tune_config() -> type:
    from l2l.train.config import FineTuneConfig

    return FineTuneConfig


def _fine_tune(config: Any) -> None:
    from dataclasses import asdict

    from l2l.report.console import print_table
    from l2l.report.run_directory import RunDirectory
    from l2l.tasks.metrics import format_interval
    from l2l.train.trainer import start_fine_tuning

    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    if folder.resumed:
        print(f"continuing the run in {config.out}")
    result = start_fine_tuning(config, folder)
    summary = result.summary
    if summary["note"]:
        print(summary["note"])
    row = {
        name: summary[name]
        for name in ("task", "method", "lr", "steps", "passes", "initial_loss", "final_loss", "seconds")
    }
    test = summary["best"]["test"]
    row |= {
        "best step": summary["best"]["step"],
        f"test {test['metric']}": format_interval(test["value"], test["interval"]),
    }
    print_table(f"fine-tune: {result.out}", [row])


def _meta_train_config() -> type:
    from l2l.meta.config import MetaTrainConfig

    return MetaTrainConfig


def _meta_train(config: Any) -> None:
    from l2l.meta.run import run_meta_training
    from l2l.report.console import print_table

    results = run_meta_training(config).provenance.results
    print_table(f"tuner: {config.out}", [results])


def _evaluate_config() -> type:
    from l2l.train.evaluate import EvaluateConfig

    return EvaluateConfig


def _evaluate(config: Any) -> None:
    from l2l.report.console import print_table
    from l2l.train.evaluate import run_evaluation

    print_table("evaluate", [run_evaluation(config)])


def _quickstart_config() -> type:
    from l2l.experiments.presets.quickstart import QuickstartConfig

    return QuickstartConfig


def _quickstart(config: Any) -> None:
    from l2l.experiments.presets.quickstart import run_quickstart

    run_quickstart(config)


def _meta_evaluate_config() -> type:
    from l2l.experiments.spec import MetaEvaluateConfig

    return MetaEvaluateConfig


def _meta_evaluate(config: Any) -> None:
    from l2l.experiments.presets.meta_evaluate import run_meta_evaluation

    run_meta_evaluation(config)


def _compare_config() -> type:
    from l2l.experiments.spec import CompareConfig

    return CompareConfig


def _compare(config: Any) -> None:
    from l2l.experiments.presets.compare import run_comparison

    run_comparison(config)


def _bench_config() -> type:
    from l2l.tools.bench import BenchConfig

    return BenchConfig


def _bench(config: Any) -> None:
    from l2l.report.console import print_table
    from l2l.tools.bench import headline, run_bench

    print_table(f"bench: {config.out}", [headline(run_bench(config))])


def _doctor_config() -> type:
    from l2l.tools.doctor import DoctorConfig

    return DoctorConfig


def _doctor(config: Any) -> None:
    from l2l.tools.doctor import run_doctor

    run_doctor(config)


def _estimate_config() -> type:
    from l2l.tools.estimate import EstimateConfig

    return EstimateConfig


def _estimate(config: Any) -> None:
    from l2l.report.console import print_table
    from l2l.tools.estimate import run_estimate

    found = run_estimate(config)
    print_table("estimate", [{name: value for name, value in found.items() if isinstance(value, str | int | float)}])
    print_table("bytes", [found["bytes"]])


@dataclass(frozen=True)
class ListConfig:
    """List what there is."""


@dataclass(frozen=True)
class TaskConfig:
    """Show a task: where its rows come from, its prompt, its options, its variants."""

    task: str
    """Name of a task, or the path of a task file."""


def _tasks_list(_: ListConfig) -> None:
    from l2l.report.console import print_table
    from l2l.tasks import get_task, task_names
    from l2l.tasks.inspect import table_row

    print_table("tasks", [table_row(get_task(name)) for name in task_names()])


def _tasks_show(config: TaskConfig) -> None:
    from l2l.tasks import get_task
    from l2l.tasks.inspect import card

    print(card(get_task(config.task)))


def _tasks_check_config() -> type:
    from l2l.tasks.inspect import CheckConfig

    return CheckConfig


def _tasks_check(config: Any) -> None:
    from l2l.report.console import print_table
    from l2l.tasks.inspect import check

    found = check(config)
    print("\n".join(found.examples))
    if found.options:
        print_table("options", found.options)
    print_table(f"check: {config.task}", [found.facts])
    for warning in found.warnings:
        print(f"warning: {warning}")


def _lr_probe_config() -> type:
    from l2l.tools.lr_probe import ProbeConfig

    return ProbeConfig


def _lr_probe(config: Any) -> None:
    from l2l.tools.lr_probe import run_lr_probe

    run_lr_probe(config)


def _methods_list(_: ListConfig) -> None:
    from l2l.report.console import print_table
    from l2l.train.method_list import method_list

    print_table("methods", method_list())


COMMANDS = (
    Command("quickstart", "learn a tuner and compare it with MeZO and DiZO, offline", _quickstart_config, _quickstart),
    Command("meta-train", "learn a tuner for a model over a pool of tasks", _meta_train_config, _meta_train),
    Command("fine-tune", "fine-tune a model on a task with forward passes only", _fine_tune_config, _fine_tune),
    Command("lr-probe", "recommend lr and epsilon from a few dozen probes of the loss", _lr_probe_config, _lr_probe),
    Command("meta-evaluate", "judge tuners by the frozen protocol", _meta_evaluate_config, _meta_evaluate),
    Command("compare", "compare methods at equal passes and equal tuning effort", _compare_config, _compare),
    Command("evaluate", "loss and metric of a model on a task", _evaluate_config, _evaluate),
    Command("bench", "measure a step beside its two forwards and the textbook loop", _bench_config, _bench),
    Command("estimate", "peak memory and time per step, before a run", _estimate_config, _estimate),
    Command("doctor", "what this machine has, and which noise backend serves it", _doctor_config, _doctor),
    Command("tuners list", "bundled and known tuners", lambda: on_tuners.ListTunersConfig, on_tuners.list_tuners),
    Command(
        "tuners show",
        "what a tuner is, how it was made, how far it moved",
        lambda: on_tuners.ShowConfig,
        on_tuners.show,
    ),
    Command(
        "tuners verify", "files, blocks, sigma and card of a tuner", lambda: on_tuners.VerifyConfig, on_tuners.verify
    ),
    Command("tuners card", "licence and results into a tuner's card", lambda: on_tuners.CardConfig, on_tuners.card),
    Command("tuners diff", "what two tuners differ in", on_tuners.diff_config, on_tuners.diff),
    Command("tuners test", "go or no-go on a derivative of the base model", on_tuners.trial_config, on_tuners.trial),
    Command("tuners import", "a published pickle, read safely", lambda: on_tuners.ImportConfig, on_tuners.import_tuner),
    Command("tuners download", "fetch a tuner, checksummed", on_tuners.download_config, on_tuners.download),
    Command("tuners push", "upload a tuner to the hub", lambda: on_tuners.PushConfig, on_tuners.push),
    Command("tasks list", "the tasks that come with the package", lambda: ListConfig, _tasks_list),
    Command("tasks show", "what a task asks, and where its rows come from", lambda: TaskConfig, _tasks_show),
    Command("tasks check", "a task as a model sees it, before any training", _tasks_check_config, _tasks_check),
    Command("methods list", "the methods that come with the package", lambda: ListConfig, _methods_list),
)

POSITIONAL: dict[str, tuple[str, ...]] = {
    **{f"tuners {verb}": ("tuner",) for verb in ("show", "verify", "card", "test", "download")},
    "tuners diff": ("first", "second"),
    "tuners import": ("file",),
    "tuners push": ("tuner", "repo_id"),
    "tasks show": ("task",),
    "tasks check": ("task",),
}
"""Commands whose first arguments need no flag, and the fields that these are."""
