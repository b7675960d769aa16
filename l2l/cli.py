"""The command line: every command is a typed configuration, from flags, from ``--config file.yaml``, or both."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from l2l import __version__

BAD_INPUT = (ValueError, FileNotFoundError, FloatingPointError, NotADirectoryError, PermissionError)
"""What a user can mend: one line on stderr, exit code 2. Anything else is our own bug and shows its traceback."""


@dataclass(frozen=True)
class Command:
    """A command: its configuration class, and what runs it."""

    path: str
    help: str
    config: Callable[[], type]
    run: Callable[[Any], None]


def _fine_tune_config() -> type:
    from l2l.finetune.config import FineTuneConfig

    return FineTuneConfig


def _fine_tune(config: Any) -> None:
    from dataclasses import asdict

    from l2l.finetune.run import prepare, run
    from l2l.report.rundir import RunDirectory
    from l2l.report.tables import print_table

    folder = RunDirectory(config.out, asdict(config), config.overwrite)
    if folder.resumed:
        print(f"continuing the run in {config.out}")
    result = run(prepare(config), config, folder)
    summary = result.summary
    row = {
        name: summary[name]
        for name in ("task", "method", "lr", "steps", "passes", "initial_loss", "final_loss", "seconds")
    }
    best = summary["best"]
    row |= {"best step": best["step"], f"test {best['test']['metric']}": best["test"]["value"]}
    print_table(f"fine-tune: {result.out}", [row])


def _meta_train_config() -> type:
    from l2l.meta.config import MetaTrainConfig

    return MetaTrainConfig


def _meta_train(config: Any) -> None:
    from l2l.meta.run import run
    from l2l.report.tables import print_table

    results = run(config).provenance.results
    print_table(f"tuner: {config.out}", [results])


def _evaluate_config() -> type:
    from l2l.finetune.evaluate import EvaluateConfig

    return EvaluateConfig


def _evaluate(config: Any) -> None:
    from l2l.finetune.evaluate import run
    from l2l.report.tables import print_table

    print_table("evaluate", [run(config)])


def _quickstart_config() -> type:
    from l2l.compare.quickstart import QuickstartConfig

    return QuickstartConfig


def _quickstart(config: Any) -> None:
    from l2l.compare.quickstart import run

    run(config)


def _meta_evaluate_config() -> type:
    from l2l.compare.config import MetaEvaluateConfig

    return MetaEvaluateConfig


def _meta_evaluate(config: Any) -> None:
    from l2l.compare.evaluate import run

    run(config)


def _bench_config() -> type:
    from l2l.bench.config import BenchConfig

    return BenchConfig


def _bench(config: Any) -> None:
    from l2l.bench.run import run
    from l2l.bench.tables import headline
    from l2l.report.tables import print_table

    print_table(f"bench: {config.out}", [headline(run(config))])


def _doctor_config() -> type:
    from l2l.bench.doctor import DoctorConfig

    return DoctorConfig


def _doctor(config: Any) -> None:
    from l2l.bench.doctor import run

    run(config)


def _estimate_config() -> type:
    from l2l.estimate.config import EstimateConfig

    return EstimateConfig


def _estimate(config: Any) -> None:
    from l2l.estimate.run import run
    from l2l.report.tables import print_table

    found = run(config)
    print_table("estimate", [{name: value for name, value in found.items() if isinstance(value, str | int | float)}])
    print_table("bytes", [found["bytes"]])


@dataclass(frozen=True)
class ShowConfig:
    """Show a tuner: recipe, results, sigma, how far it moved."""

    tuner: str
    """Directory, bundled name or hub id."""
    revision: str | None = None
    """Revision of a hub tuner."""


def _tuners_show(config: ShowConfig) -> None:
    from l2l.tuners.card import render
    from l2l.tuners.store import to_config
    from l2l.tuners.tuner import Tuner

    tuner = Tuner.from_pretrained(config.tuner, config.revision)
    print(render(tuner, to_config(tuner)))


@dataclass(frozen=True)
class ListConfig:
    """List what there is."""


def _tasks_list(_: ListConfig) -> None:
    from l2l.report.tables import print_table
    from l2l.tasks import get_task, task_names

    tasks = [get_task(name) for name in task_names()]
    print_table("tasks", [{"task": f"{t.name}@{t.version}", "loss": t.form, "metric": t.metric} for t in tasks])


def _methods_list(_: ListConfig) -> None:
    from l2l.methods import method_class, method_names
    from l2l.report.tables import print_table

    rows = [{"method": name, "what": (method_class(name).__doc__ or "").splitlines()[0]} for name in method_names()]
    print_table("methods", rows)


COMMANDS = (
    Command("quickstart", "learn a tuner and compare it with MeZO and DiZO, offline", _quickstart_config, _quickstart),
    Command("meta-train", "learn a tuner for a model over a pool of tasks", _meta_train_config, _meta_train),
    Command("fine-tune", "fine-tune a model on a task with forward passes only", _fine_tune_config, _fine_tune),
    Command("meta-evaluate", "judge tuners by the frozen protocol", _meta_evaluate_config, _meta_evaluate),
    Command("evaluate", "loss and metric of a model on a task", _evaluate_config, _evaluate),
    Command("bench", "measure a step beside its two forwards and the textbook loop", _bench_config, _bench),
    Command("estimate", "peak memory and time per step, before a run", _estimate_config, _estimate),
    Command("doctor", "what this machine has, and which noise backend serves it", _doctor_config, _doctor),
    Command("tuners show", "what a tuner is, how it was made, how far it moved", lambda: ShowConfig, _tuners_show),
    Command("tasks list", "the tasks that come with the package", lambda: ListConfig, _tasks_list),
    Command("methods list", "the methods that come with the package", lambda: ListConfig, _methods_list),
)

POSITIONAL = {"tuners show": "tuner"}


def _config_parser(command: Command) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=command.help)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    kind = command.config()
    positional = POSITIONAL.get(command.path)
    if positional:
        parser.add_argument(positional, type=str)
    parser.add_class_arguments(kind, skip={positional} if positional else None)
    return parser


def _parser(commands: Sequence[Command]) -> ArgumentParser:
    """The parser of all commands; of those that share a first word, as subcommands of it."""
    parser = ArgumentParser(
        prog="l2l", exit_on_error=False, description="Zeroth-order fine-tuning with learned tuners."
    )
    parser.add_argument("--version", action="version", version=f"l2l {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subcommands(dest="command")
    groups: dict[str, Any] = {}
    for command in commands:
        first, _, second = command.path.partition(" ")
        if not second:
            verbs.add_subcommand(first, _config_parser(command), help=command.help)
            continue
        if first not in groups:
            group = ArgumentParser(exit_on_error=False)
            verbs.add_subcommand(first, group, help=f"work with {first}")
            groups[first] = group.add_subcommands(dest="verb")
        groups[first].add_subcommand(second, _config_parser(command), help=command.help)
    return parser


def _chosen(arguments: Namespace) -> tuple[Command, Any]:
    """The command named, and its configuration."""
    path, values = arguments["command"], arguments[arguments["command"]]
    if "verb" in values:
        path, values = f"{path} {values['verb']}", values[values["verb"]]
    command = next(command for command in COMMANDS if command.path == path)
    options = {name: value for name, value in values.items() if name != "config"}
    return command, command.config()(**options)


def _needed(argv: Sequence[str]) -> list[Command]:
    """Only the configuration classes of the command named are imported; all of them for the general help."""
    named = [command for command in COMMANDS if command.path.split()[0] in argv]
    return named or list(COMMANDS)


def _underscored(word: str) -> str:
    """``--data-dir`` means ``--data_dir``."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _quiet() -> None:
    """Libraries keep to warnings; ours is the only progress bar."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="lightning")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    given = [_underscored(word) for word in given if word != "--debug"]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _quiet()
    try:
        arguments = _parser(_needed(given)).parse_args(given)
        command, config = _chosen(arguments)
        command.run(config)
    except (*BAD_INPUT, argparse.ArgumentError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"l2l: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("l2l: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
