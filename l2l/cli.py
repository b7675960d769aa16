"""The command line: every command is a typed configuration, from flags, from ``--config file.yaml``, or both."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from l2l import __version__
from l2l.aliases import KEYS, renamed
from l2l.commands import COMMANDS, POSITIONAL, Command

BAD_INPUT = (ValueError, FileNotFoundError, FloatingPointError, NotADirectoryError, PermissionError)
"""What a user can mend: one line on stderr, exit code 2. Anything else is our own bug and shows its traceback."""


def _config_parser(command: Command) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=command.help)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    kind = command.config()
    positional = POSITIONAL.get(command.path, ())
    for name in positional:
        parser.add_argument(name, type=str)
    parser.add_class_arguments(kind, skip=set(positional) or None)
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


def _with_todays_names(words: Sequence[str], command: Command) -> list[str]:
    """The command line with old option names replaced, those in the file of ``--config`` included."""
    known = {field.name for field in fields(command.config())}
    found: list[str] = []
    for i, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        before = words[i - 1].removeprefix("--") if i and words[i - 1].startswith("--") else ""
        if before == "config" or (name == "config" and equals and word.startswith("--")):
            found.append(("--config=" if equals else "") + _config_text(value if equals else word, known))
        elif word.startswith("--"):
            ((renamed_to, fresh),) = renamed({name: value if equals else None}, known).items()
            found.append(f"--{renamed_to}{equals}{fresh if equals else ''}")
        elif before:
            ((_, fresh),) = renamed({KEYS.get(before, before): word}, known).items()
            found.append(str(fresh))
        else:
            found.append(word)
    return found


def _config_text(path: str, known: Collection[str]) -> str:
    """The path itself, or the file's content under the names of today if it has old ones."""
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return path  # the parser says what is wrong with it
    if not isinstance(given, dict):
        return path
    fresh = renamed(given, known)
    return path if fresh == given else yaml.safe_dump(fresh, sort_keys=False)


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
        needed = _needed(given)
        if len(needed) == 1:
            given = _with_todays_names(given, needed[0])
        arguments = _parser(needed).parse_args(given)
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
