"""The command line: a table of commands, each a typed configuration read from flags, ``--config file.yaml``, or both."""

import argparse
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from l2l import __version__
from l2l.aliases import renamed
from l2l.arguments import described, hints_of, repeated_key


class Command(NamedTuple):
    """What a command does, and where: ``l2l.<module>`` is imported only when the command is named."""

    help: str
    module: str
    config: str | None
    """The dataclass of the options; None: the command has no options."""
    run: str
    """The function of that configuration that runs the command and prints its result."""
    positional: tuple[str, ...] = ()
    """Fields of the configuration that need no flag."""


_TUNER, _TASK = ("tuner",), ("task",)
COMMANDS = {
    "quickstart": Command(
        "learn a tuner and compare it with MeZO and DiZO, offline",
        "experiments.presets.quickstart",
        "QuickstartConfig",
        "run_quickstart",
    ),
    "meta-train": Command(
        "learn a tuner for a model over a pool of tasks", "meta.run", "MetaTrainConfig", "meta_train_command"
    ),
    "fine-tune": Command(
        "fine-tune a model on a task with forward passes only", "train.trainer", "FineTuneConfig", "fine_tune_command"
    ),
    "init": Command(
        "a task file and a configuration of a first run, from a table", "tools.init", "InitConfig", "init_command", ("file",)
    ),
    "lr-probe": Command(
        "recommend lr and epsilon from a few dozen probes of the loss", "tools.lr_probe", "ProbeConfig", "run_lr_probe"
    ),
    "meta-evaluate": Command(
        "judge tuners by the frozen protocol", "experiments.presets.meta_evaluate", "MetaEvaluateConfig", "run_meta_evaluation"
    ),
    "compare": Command(
        "compare methods at equal passes and equal tuning effort",
        "experiments.presets.compare",
        "CompareConfig",
        "run_comparison",
    ),
    "plan": Command(
        "choose what a user would tune, by runs on pool tasks, into a tuner",
        "experiments.presets.plan",
        "PlanConfig",
        "run_plan",
    ),
    "replay": Command(
        "rebuild the weights of any step from the run log, or say where two runs part",
        "train.replay",
        "ReplayConfig",
        "replay_command",
        ("run",),
    ),
    "report": Command(
        "one HTML page of runs: curves, what moved, examples", "tools.run_report", "ReportConfig", "report_command", ("runs",)
    ),
    "evaluate": Command("loss and metric of a model on a task", "train.evaluate", "EvaluateConfig", "evaluate_command"),
    "bench": Command(
        "measure a step beside its two forwards and the textbook loop", "tools.bench", "BenchConfig", "bench_command"
    ),
    "estimate": Command("peak memory and time per step, before a run", "tools.estimate", "EstimateConfig", "estimate_command"),
    "simulate": Command(
        "seconds of a step on many GPUs, by a model of it", "tools.simulate", "SimulateConfig", "run_simulation"
    ),
    "doctor": Command("what this machine has, and which noise backend serves it", "tools.doctor", "DoctorConfig", "run_doctor"),
    "tuners list": Command("bundled and known tuners", "tuner_commands", None, "list_tuners"),
    "tuners show": Command(
        "what a tuner is, how it was made, how far it moved", "tuner_commands", "ShowConfig", "show", _TUNER
    ),
    "tuners verify": Command("files, blocks, sigma and card of a tuner", "tuner_commands", "VerifyConfig", "verify", _TUNER),
    "tuners card": Command("licence and results into a tuner's card", "tuner_commands", "CardConfig", "card", _TUNER),
    "tuners diff": Command("what two tuners differ in", "tuner_commands", "DiffConfig", "diff", ("first", "second")),
    "tuners test": Command("go or no-go on a derivative of the base model", "tuner_commands", "GoNoGoConfig", "trial", _TUNER),
    "tuners import": Command("a published pickle, read safely", "tuner_commands", "ImportConfig", "import_tuner", ("file",)),
    "tuners download": Command("fetch a tuner, checksummed", "tuner_commands", "DownloadConfig", "download", _TUNER),
    "tuners push": Command("upload a tuner to the hub", "tuner_commands", "PushConfig", "push", ("tuner", "repo_id")),
    "tasks list": Command("the tasks that come with the package", "tasks.inspect", None, "list_tasks"),
    "tasks show": Command("what a task asks, and where its rows come from", "tasks.inspect", "ShowConfig", "show_task", _TASK),
    "tasks check": Command(
        "a task as a model sees it, before any training", "tasks.inspect", "CheckConfig", "check_task", _TASK
    ),
    "methods list": Command("the methods that come with the package", "train.baselines", None, "list_methods"),
}

BAD_INPUT = (ValueError, FloatingPointError, OSError, MemoryError, argparse.ArgumentError)
"""What a user can mend: one line on stderr, exit code 2. So are :data:`OF_LIBRARIES`. Any other exception is a defect and shows
its traceback."""
OF_LIBRARIES = {"torch": ("OutOfMemoryError", "AcceleratorError"), "safetensors": ("SafetensorError",)}
"""Library -> its errors of devices, of memory, and of files."""
NO_MEMORY = "DefaultCPUAllocator"
"""In the message of the RuntimeError that torch raises where the CPU's memory is full."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, outside of the steps of a run, which save first (:func:`l2l.report.run_directory.stop_requests`)."""

    number = signal.SIGTERM


def _terminate(*_: object) -> None:
    raise Terminated("terminated; the same command continues from the last checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, 130 when interrupted (Ctrl-C), 143 when terminated (SIGTERM)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)
        warnings.formatwarning = lambda message, *_: f"l2l: {message}\n"
    debug, named = "--debug" in words, list[str]()
    set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)
    # Libraries keep to warnings: the package has the only progress bar.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="lightning")
    try:
        # --data-dir means --data_dir
        words = [
            re.sub("^--[^=]+", lambda name: f"--{name[0][2:].replace('-', '_')}", word) for word in words if word != "--debug"
        ]
        first = next((word for word in words if not word.startswith("-")), None)
        # Only the configurations of commands whose first word is given are imported; all of them for the help.
        named = [path for path in COMMANDS if path.split()[0] == first] or list(COMMANDS)
        if len(named) == 1:
            words = _with_current_names(words, COMMANDS[named[0]])
        arguments = _parser(named).parse_args(words)
        path, values = arguments["command"], arguments[arguments["command"]]
        if "verb" in values:
            path, values = f"{path} {values['verb']}", values[values["verb"]]
        command = COMMANDS[path]
        config = _imported(command, command.config)
        options = {name: value for name, value in values.items() if name != "config"}
        _imported(command, command.run)(*([config(**options)] if config else []))
    except BrokenPipeError:  # who reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not _is_bad_input(error):
            raise
        if debug:
            traceback.print_exc()
        else:
            print(f"l2l: {_unfit(error, named) or _line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        line = str(stop) or "interrupted; the same command continues from the last checkpoint"
        print(f"l2l: {line}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0


def _is_bad_input(error: Exception) -> bool:
    known: list[Any] = list(BAD_INPUT)
    for library, names in OF_LIBRARIES.items():  # which are imported by the commands that need them
        known += [getattr(sys.modules[library], name, BAD_INPUT) for name in names if library in sys.modules]
    return isinstance(error, tuple(known)) or (isinstance(error, RuntimeError) and NO_MEMORY in str(error))


def _line(error: Exception) -> str:
    """The error in one line, with what was added to it on the way."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join("; ".join([text, *getattr(error, "__notes__", ())]).split())


def _imported(command: Command, name: str | None) -> Any:
    return name and getattr(import_module(f"{__package__}.{command.module}"), name)


def _unfit(error: Exception, paths: Sequence[str]) -> str | None:
    """What a configuration made in Python says of a value that is of none of an option's types; None for other errors."""
    found = re.search(r'Parser key "(\w+)":.*(?:Given value|Got value): (.*)', str(error), re.DOTALL)
    if found is None or not isinstance(error, argparse.ArgumentError):
        return None
    for path in paths:
        if (config := _imported(COMMANDS[path], COMMANDS[path].config)) and found[1] in hints_of(config):
            return f"{found[1]}={found[2].strip()!r} must be {described(hints_of(config)[found[1]])}"
    return None


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
        command = COMMANDS[path]
        options = ArgumentParser(exit_on_error=False, description=command.help)
        options.add_argument("--config", action="config", help="YAML file with any of the options below")
        config = _imported(command, command.config)
        for name in command.positional:
            several = config is not None and hints_of(config)[name] == list[str]
            options.add_argument(name, type=str, nargs="+" if several else None)
        if config:
            options.add_class_arguments(config, skip=set(command.positional) or None)
        (groups[first] if second else verbs).add_subcommand(second or first, options, help=command.help)
    return parser


def _with_current_names(words: Sequence[str], command: Command) -> list[str]:
    """The command line with old names of options and values replaced, those in the file of ``--config`` included, and ``true``
    after a switch that has no value."""
    config = _imported(command, command.config)
    known = {field.name for field in fields(config)} if config else set()
    hints = hints_of(config) if config else {}
    found: list[str] = []
    option = ""  # the last word, where it is an option without "=": its value comes next
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if not word.startswith("--"):
            found.append(_current_value(option, word, known))
            option = ""
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        (option,) = renamed({name: None}, known)
        if equals:
            found.append(f"--{option}={_current_value(option, value, known)}")
            option = ""
        elif hints.get(option) is bool and following.startswith("--"):  # --offload means --offload true
            found.append(f"--{option}=true")
            option = ""
        else:
            found.append(f"--{option}")
    return found


def _current_value(option: str, value: str, known: Collection[str]) -> str:
    """The value under its current name. A configuration file with old names in it becomes its text with current ones."""
    try:
        text = Path(value).read_text() if option == "config" else value if value.startswith("{") else ""
        twice, given = repeated_key(text), yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return value  # the parser says what is wrong with it
    if twice is not None:
        where = f"{value}:{twice[1]}" if option == "config" else f"--{option} {value}"
        raise ValueError(f"{where}: {twice[0]!r} stands there twice; remove one")
    if option != "config":
        return str(renamed({option: value}, {*known, option})[option])
    if not isinstance(given, Mapping):
        return value
    current = renamed(given, known)
    return value if current == given else yaml.safe_dump(current, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
