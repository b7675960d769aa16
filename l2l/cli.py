"""The command line: a table of commands, each a typed configuration read from flags, ``--config file.yaml``, or both."""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from l2l import __version__
from l2l.aliases import renamed


class Command(NamedTuple):
    """Targets are written ``module:name`` and imported only when the command is named."""

    help: str
    config: str | None
    """Target of the dataclass of the options; None: the command has no options."""
    run: str
    """Target of the function of that configuration that runs the command and prints its result."""
    positional: tuple[str, ...] = ()
    """Fields of the configuration that need no flag."""


COMMANDS = {
    "quickstart": Command(
        "learn a tuner and compare it with MeZO and DiZO, offline",
        "l2l.experiments.presets.quickstart:QuickstartConfig",
        "l2l.experiments.presets.quickstart:run_quickstart",
    ),
    "meta-train": Command(
        "learn a tuner for a model over a pool of tasks",
        "l2l.meta.config:MetaTrainConfig",
        "l2l.meta.run:meta_train_command",
    ),
    "fine-tune": Command(
        "fine-tune a model on a task with forward passes only",
        "l2l.train.config:FineTuneConfig",
        "l2l.train.trainer:fine_tune_command",
    ),
    "lr-probe": Command(
        "recommend lr and epsilon from a few dozen probes of the loss",
        "l2l.tools.lr_probe:ProbeConfig",
        "l2l.tools.lr_probe:run_lr_probe",
    ),
    "meta-evaluate": Command(
        "judge tuners by the frozen protocol",
        "l2l.experiments.spec:MetaEvaluateConfig",
        "l2l.experiments.presets.meta_evaluate:run_meta_evaluation",
    ),
    "compare": Command(
        "compare methods at equal passes and equal tuning effort",
        "l2l.experiments.spec:CompareConfig",
        "l2l.experiments.presets.compare:run_comparison",
    ),
    "evaluate": Command(
        "loss and metric of a model on a task",
        "l2l.train.evaluate:EvaluateConfig",
        "l2l.train.evaluate:evaluate_command",
    ),
    "bench": Command(
        "measure a step beside its two forwards and the textbook loop",
        "l2l.tools.bench:BenchConfig",
        "l2l.tools.bench:bench_command",
    ),
    "estimate": Command(
        "peak memory and time per step, before a run",
        "l2l.tools.estimate:EstimateConfig",
        "l2l.tools.estimate:estimate_command",
    ),
    "doctor": Command(
        "what this machine has, and which noise backend serves it",
        "l2l.tools.doctor:DoctorConfig",
        "l2l.tools.doctor:run_doctor",
    ),
    "tuners list": Command("bundled and known tuners", None, "l2l.tuner_commands:list_tuners"),
    "tuners show": Command(
        "what a tuner is, how it was made, how far it moved",
        "l2l.tuner_commands:ShowConfig",
        "l2l.tuner_commands:show",
        ("tuner",),
    ),
    "tuners verify": Command(
        "files, blocks, sigma and card of a tuner",
        "l2l.tuner_commands:VerifyConfig",
        "l2l.tuner_commands:verify",
        ("tuner",),
    ),
    "tuners card": Command(
        "licence and results into a tuner's card",
        "l2l.tuner_commands:CardConfig",
        "l2l.tuner_commands:card",
        ("tuner",),
    ),
    "tuners diff": Command(
        "what two tuners differ in", "l2l.tuner_commands:DiffConfig", "l2l.tuner_commands:diff", ("first", "second")
    ),
    "tuners test": Command(
        "go or no-go on a derivative of the base model",
        "l2l.experiments.presets.tuner_test:GoNoGoConfig",
        "l2l.tuner_commands:trial",
        ("tuner",),
    ),
    "tuners import": Command(
        "a published pickle, read safely",
        "l2l.tuner_commands:ImportConfig",
        "l2l.tuner_commands:import_tuner",
        ("file",),
    ),
    "tuners download": Command(
        "fetch a tuner, checksummed", "l2l.tuner_commands:DownloadConfig", "l2l.tuner_commands:download", ("tuner",)
    ),
    "tuners push": Command(
        "upload a tuner to the hub",
        "l2l.tuner_commands:PushConfig",
        "l2l.tuner_commands:push",
        ("tuner", "repo_id"),
    ),
    "tasks list": Command("the tasks that come with the package", None, "l2l.tasks.inspect:list_tasks"),
    "tasks show": Command(
        "what a task asks, and where its rows come from",
        "l2l.tasks.inspect:ShowConfig",
        "l2l.tasks.inspect:show_task",
        ("task",),
    ),
    "tasks check": Command(
        "a task as a model sees it, before any training",
        "l2l.tasks.inspect:CheckConfig",
        "l2l.tasks.inspect:check_task",
        ("task",),
    ),
    "methods list": Command("the methods that come with the package", None, "l2l.train.baselines:list_methods"),
}

BAD_INPUT = (ValueError, FileNotFoundError, FloatingPointError, NotADirectoryError, PermissionError)
"""What a user can mend: one line on stderr, exit code 2. Any other exception is a defect and shows its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        warnings.formatwarning = lambda message, *_: f"l2l: {message}\n"
    debug = "--debug" in words
    words = [_with_underscores(word) for word in words if word != "--debug"]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _silence_libraries()
    try:
        named = _named_commands(words)
        if len(named) == 1:
            words = _with_current_names(words, *named)
        command, config = _parsed(_parser(named).parse_args(words))
        run = _imported(command.run)
        run() if config is None else run(config)
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


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _with_underscores(word: str) -> str:
    """``--data-dir`` means ``--data_dir``."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _silence_libraries() -> None:
    """Libraries keep to warnings: the package has the only progress bar."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="lightning")


def _named_commands(words: Sequence[str]) -> list[str]:
    """Commands whose first word is given, so that only their configurations are imported; else all, for the help."""
    first = next((word for word in words if not word.startswith("-")), None)
    return [path for path in COMMANDS if path.split()[0] == first] or list(COMMANDS)


def _parser(paths: Sequence[str]) -> ArgumentParser:
    """The parser of these commands; those that share a first word are subcommands of it."""
    parser = ArgumentParser(prog="l2l", exit_on_error=False, description="Zeroth-order fine-tuning with learned tuners.")
    parser.add_argument("--version", action="version", version=f"l2l {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subcommands(dest="command")
    groups: dict[str, Any] = {}
    for path in paths:
        first, _, second = path.partition(" ")
        if second and first not in groups:
            group = ArgumentParser(exit_on_error=False)
            verbs.add_subcommand(first, group, help=f"work with {first}")
            groups[first] = group.add_subcommands(dest="verb")
        parent = groups[first] if second else verbs
        parent.add_subcommand(second or first, _command_parser(COMMANDS[path]), help=COMMANDS[path].help)
    return parser


def _command_parser(command: Command) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=command.help)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    for name in command.positional:
        parser.add_argument(name, type=str)
    if command.config is not None:
        parser.add_class_arguments(_imported(command.config), skip=set(command.positional) or None)
    return parser


def _parsed(arguments: Namespace) -> tuple[Command, Any]:
    """The command and its configuration."""
    path, values = arguments["command"], arguments[arguments["command"]]
    if "verb" in values:
        path, values = f"{path} {values['verb']}", values[values["verb"]]
    command = COMMANDS[path]
    options = {name: value for name, value in values.items() if name != "config"}
    return command, None if command.config is None else _imported(command.config)(**options)


def _with_current_names(words: Sequence[str], path: str) -> list[str]:
    """The command line with old names of options and values replaced, those in the file of ``--config`` included."""
    target = COMMANDS[path].config
    known = {field.name for field in fields(_imported(target))} if target else set()
    found: list[str] = []
    option = ""  # the last word, where it is an option without "=": its value comes next
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            found.append(_current_value(option, word, known))
            option = ""
        elif equals:
            (current,) = renamed({name: None}, known)
            found.append(f"--{current}={_current_value(current, value, known)}")
            option = ""
        else:
            (option,) = renamed({name: None}, known)
            found.append(f"--{option}")
    return found


def _current_value(option: str, value: str, known: Collection[str]) -> str:
    """The value under its current name. A configuration file with old names in it becomes its text with current ones."""
    if option != "config":
        return str(renamed({option: value}, {*known, option})[option])
    try:
        given = yaml.safe_load(Path(value).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return value  # the parser says what is wrong with it
    if not isinstance(given, Mapping):
        return value
    current = renamed(given, known)
    return value if current == given else yaml.safe_dump(current, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
