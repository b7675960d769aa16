"""What is checked of a tuner's files before they cost anything: kinds of file, sizes, types, checksum."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from l2l.tuners.build import build_network

SHA256 = "weights_sha256"
"""Field of the config: checksum of the weights' file. Tuners saved by older releases have none."""
MOST_TEXT = 8 << 20
"""Bytes of a config."""
MOST_TENSORS = 64
"""That a network may have, beside one per block for its basis."""
MOST_SIZE = 1 << 40
"""Of a block, along one dimension."""
SLACK = 1 << 22
"""Numbers by which a config and its weights may differ before memory is taken; the exact comparison comes after."""
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("architecture", "features", "base_model", SHA256), str),
    **dict.fromkeys(("architecture_args", "normaliser", "recipe", "results", "basis", "turns", "versions"), dict),
    "blocks": list,
    "revision": (str, type(None)),
}
DTYPES = ("F32", "F16", "BF16")


def check_regular(path: Path, most: int | None = None) -> Path:
    """The path, if a regular file of at most so many bytes is there: not a directory, a device or a pipe.

    Raises:
        OSError: it is not.
    """
    if not path.is_file():
        raise OSError("no regular file there")
    if most is not None and path.stat().st_size > most:
        raise OSError(f"{path.stat().st_size} bytes, more than {most}")
    return path


def check_types(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError unless the fields that are there hold values of the right kind, blocks of a name and sizes."""
    wrong = [name for name, kind in TYPES.items() if name in config and not isinstance(config[name], kind)]
    if not wrong and not all(map(_is_block, config["blocks"])):
        wrong = ["blocks"]
    if wrong:
        value = repr(config[wrong[0]])[:60]
        raise ValueError(f"{path} holds a value that does not fit ({wrong[0]} is {value}): get it again")


def _is_block(row: Any) -> bool:
    """Whether it may describe a block, as far as that has to be known before any of its sizes is used."""
    if not isinstance(row, dict) or not isinstance(row.get("name", ""), str):
        return False
    shape = row.get("shape", [])
    return isinstance(shape, list) and not any(isinstance(size, int) and size >= MOST_SIZE for size in shape)


def check_header(path: Path, config: dict[str, Any], basis: str) -> None:
    """Raise ValueError, before memory is taken, where dtypes are wrong or config and file are of another size by far.

    Args:
        basis: how the names of tensors begin that are not the network's.

    Raises:
        SafetensorError, OSError: the file is not readable.
    """
    held = 0
    check_length(path)
    with safe_open(path, "pt") as opened:
        names: list[str] = opened.keys()
        if len(names) > len(config["blocks"]) + MOST_TENSORS:
            raise ValueError(f"tuner weights do not fit their config: {path} holds {len(names)} tensors")
        for name in names:
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"tuner weights {name[:80]!r} are of dtype {part.get_dtype()}, not one of {DTYPES}")
            held += 0 if name.startswith(basis) else torch.Size(part.get_shape()).numel()
    if config["architecture_args"].get("blocks") != len(config["blocks"]):
        return  # refused when it is built
    asked = _asked(config["architecture"], config["architecture_args"])
    if abs(asked - held) > SLACK:
        raise ValueError(f"tuner weights do not fit their config: it is for {asked} numbers, {path} holds {held}")


def check_length(path: Path) -> None:
    """Raise OSError unless a regular file is there, whose header is not larger than a config may be."""
    with check_regular(path).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MOST_TEXT:
        raise OSError(f"a header of {length} bytes, more than {MOST_TEXT}")


def _asked(architecture: str, args: dict[str, Any]) -> int:
    """Numbers of a network, which is built without memory."""
    with suppress(ModuleNotFoundError):  # whatever is unknown is named by who builds it
        import_module(f"l2l.tuners.{architecture}" if architecture.isidentifier() else "l2l.tuners")
    with torch.device("meta"):
        network = build_network(architecture, args)
    return sum(value.numel() for value in network.state_dict().values())


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = sha256()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def verify_checksum(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError where the config knows the checksum of the file, and it has another."""
    wanted = config.get(SHA256)
    if wanted is not None and checksum(path) != wanted:
        raise ValueError(f"{path} has changed since it was saved: its sha256 is not {wanted[:80]!r}; get it again")
