"""Files that are either complete or not there."""

import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

UNFINISHED = ".writing-"
"""How the folders begin in which files are written before they take their names."""


def write_whole(target: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``target``, then rename it: an interruption leaves the old file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED) as folder:
        temporary = Path(folder) / target.name
        write(temporary)
        temporary.replace(target)
    return target


def write_json(target: Path, value: Any) -> Path:
    """Write JSON, whole. NaN is written as it is, never masked."""
    return write_whole(target, lambda path: path.write_text(json.dumps(value, indent=1) + "\n"))


def write_yaml(target: Path, value: Any, header: str = "") -> Path:
    """Write YAML, whole, in the order of the mapping."""
    return write_whole(target, lambda path: path.write_text(header + yaml.safe_dump(value, sort_keys=False)))


def write_tensors(target: Path, value: Any) -> Path:
    """Write nested tensors and plain values, whole."""
    return write_whole(target, lambda path: torch.save(value, path))


def read_tensors(path: Path) -> Any:
    """Read what :func:`write_tensors` wrote. Tensors and plain values only: nothing in the file is executed.

    Tensors are mapped, not loaded: what is copied into a model's weights takes no second copy in memory.

    Raises:
        ValueError: the file is not readable.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise OSError("not a file that torch.save wrote" if path.exists() else "no such file")
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path} is not readable ({str(error).splitlines()[0]}): remove it to start over"
        ) from error
