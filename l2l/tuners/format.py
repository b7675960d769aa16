"""The form of a tuner on disk: names of files and fields, limits, and checks that come before memory is taken.

A tuner is a folder of ``tuner.safetensors``, ``config.json`` and ``README.md``, inert: nothing in it is ever executed. The
weights' file holds the network's tensors by name, and ``basis.<block>`` for each block that has a basis.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from l2l.tuners.networks import build_network, current_network

FORMAT = "l2l-tuner"
FORMAT_VERSION = 3
"""Version 1 had no features (they were ``paper``), no basis, no kinds of blocks, and one normalizer without a name; version
2 had no block schedule. A tuner without a schedule is written as version 2, which older releases read."""
WEIGHTS, CONFIG, CARD = "tuner.safetensors", "config.json", "README.md"
BASIS = "basis."
"""Prefix of the tensors that are columns of a basis."""
SHA256 = "weights_sha256"
"""Field of the config: checksum of the weights' file. Tuners saved by older releases have none."""
FIELDS = (
    *("format_version", "architecture", "architecture_args", "normaliser"),
    *("base_model", "revision", "recipe", "results", "blocks"),
)
FIELDS_SINCE = {2: ("features", "basis"), 3: ("turns",)}
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("architecture", "features", "base_model", SHA256), str),
    **dict.fromkeys(("architecture_args", "normaliser", "recipe", "results", "basis", "turns", "versions"), dict),
    "blocks": list,
    "revision": (str, type(None)),
}
DTYPES = ("F32", "F16", "BF16")
MAX_TEXT = 8 << 20
"""Bytes of a config, and of the header of the weights' file."""
MAX_TENSORS = 64
"""Tensors of a network, beside one per block for its basis."""
MAX_SIZE = 1 << 40
"""Of a block, along one dimension."""
SLACK = 1 << 22
"""Numbers by which config and weights may differ before memory is taken; the exact comparison comes after."""


def sha256_of(path: Path) -> str:
    """Checksum of a file: 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def validate_file(path: Path, most: int | None = None) -> Path:
    """The path, if it is a regular file of at most so many bytes: no directory, device or pipe.

    Raises:
        OSError: it is not.
    """
    if not path.is_file():
        raise OSError("no regular file there")
    if most is not None and path.stat().st_size > most:
        raise OSError(f"{path.stat().st_size} bytes, more than {most}")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """A tuner's config, of any version, with all fields of that version, each of its type.

    Raises:
        ValueError: it is not readable, of a newer version, or a field is missing or of another type.
    """
    try:
        config = json.loads(validate_file(path, MAX_TEXT).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither JSON nor text
        raise ValueError(f"{path} is not a readable tuner config ({error}): get it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} is not an l2l tuner: its 'format' is not {FORMAT!r}")
    number = config.get("format_version", 1)
    if not isinstance(number, int) or not 1 <= number <= FORMAT_VERSION:
        raise ValueError(f"{path} has format version {number}; this l2l reads 1 to {FORMAT_VERSION}: upgrade l2l")
    needed = (*FIELDS, *(field for since, fields in FIELDS_SINCE.items() if number >= since for field in fields))
    missing = [field for field in needed if field not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the file is incomplete, get it again")
    wrong = [name for name, kind in TYPES.items() if name in config and not isinstance(config[name], kind)]
    if not wrong and not all(map(_is_block, config["blocks"])):
        wrong = ["blocks"]
    if wrong:
        value = repr(config[wrong[0]])[:60]
        raise ValueError(f"{path} holds a value that does not fit ({wrong[0]} is {value}): get it again")
    return config


def _is_block(row: Any) -> bool:
    """Whether the row may be used at all: its sizes are not yet known to be whole numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("name", ""), str):
        return False
    shape = row.get("shape", [])
    return isinstance(shape, list) and not any(isinstance(size, int) and size >= MAX_SIZE for size in shape)


def validate_header(path: Path, config: dict[str, Any]) -> None:
    """Compare the header of the weights' file with its config, before memory is taken.

    Raises:
        ValueError: a dtype is wrong, or config and file differ in size by far.
        SafetensorError, OSError: the file is not readable.
    """
    held = 0
    with validate_file(path).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_TEXT:
        raise OSError(f"a header of {length} bytes, more than {MAX_TEXT}")
    with safe_open(path, "pt") as opened:
        names: list[str] = opened.keys()
        if len(names) > len(config["blocks"]) + MAX_TENSORS:
            raise ValueError(f"tuner weights do not fit their config: {path} holds {len(names)} tensors")
        for name in names:
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"tuner weights {name[:80]!r} are of dtype {part.get_dtype()}, not one of {DTYPES}")
            held += 0 if name.startswith(BASIS) else torch.Size(part.get_shape()).numel()
    if config["architecture_args"].get("blocks") != len(config["blocks"]):
        return  # refused when the tuner is built
    with torch.device("meta"):
        network = build_network(config["architecture"], config["architecture_args"])
    asked = sum(value.numel() for value in network.state_dict().values())
    if abs(asked - held) > SLACK:
        raise ValueError(f"tuner weights do not fit their config: it is for {asked} numbers, {path} holds {held}")


def validate_checksum(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError where the config knows the checksum of the file, and it has another."""
    wanted = config.get(SHA256)
    if wanted is not None and sha256_of(path) != wanted:
        raise ValueError(f"{path} has changed since it was saved: its sha256 is not {wanted[:80]!r}; get it again")


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The config as this version would have written it."""
    architecture, args = current_network(config["architecture"], config["architecture_args"])
    first: dict[str, Any] = {}
    if config["format_version"] == 1:
        first = {"features": "paper", "basis": {}, "normaliser": {"name": "energy", **config["normaliser"]}}
    return {"turns": {}} | config | first | {"architecture": architecture, "architecture_args": args}
