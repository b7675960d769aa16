"""The directory of a run: who may write into it, whether it is continued, its scalars in CSV and TensorBoard.

Files are written under another name and renamed, so that each is either complete or not there.
"""

import csv
import json
import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

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


CONFIG, SUMMARY, METRICS, CHECKPOINT = "config.yaml", "summary.json", "metrics.csv", "checkpoint.pt"
LIBRARIES = ("torch", "transformers", "peft", "lightning", "datasets", "safetensors")


@final
class RunDirectory:
    """``config.yaml``, ``metrics.csv``, TensorBoard events, ``summary.json``, a picture; a checkpoint while it runs.

    A directory belongs to one configuration. The same configuration again continues where its checkpoint was taken.

    Args:
        config: plain values; written to ``config.yaml``.
        overwrite: remove what an earlier run left in ``path``.

    Raises:
        ValueError: the directory holds another run, a finished one, or files that no run wrote. Nothing is written.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        """Present while the run is not finished."""
        self.config = config
        self._overwrite = overwrite
        self.resumed = False
        way_out = "choose another --out, or pass --overwrite true to remove it"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is not a directory: choose another --out")
        if not self._entries():
            return
        earlier = self.recorded(self.path)
        if earlier is None:
            raise ValueError(f"{self.path} holds files that no run wrote: choose another --out")
        if overwrite:
            return
        if earlier != _plain(config):
            raise ValueError(f"{self.path} holds another run (its {CONFIG} differs): {way_out}")
        if (self.path / SUMMARY).exists():
            raise ValueError(f"{self.path} holds this run, finished: {way_out}")
        self.resumed = self.checkpoint.is_file()

    @staticmethod
    def recorded(path: str | Path) -> dict[str, Any] | None:
        """The configuration of the run in a folder; None where no run has written one there."""
        try:
            found = yaml.safe_load((Path(path) / CONFIG).read_text())
        except (OSError, ValueError, yaml.YAMLError):  # ValueError: not text
            return None
        return found if isinstance(found, dict) and "out" in found else None

    def _entries(self) -> list[Path]:
        """The files of the directory, without those that a killed process was about to write."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        return [entry for entry in found if not entry.name.startswith(UNFINISHED)]

    def create(self) -> "RunDirectory":
        """Make the directory and write ``config.yaml``."""
        if self._overwrite and self._entries():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in self.path.glob(f"{UNFINISHED}*"):
            shutil.rmtree(stale)
        write_yaml(self.path / CONFIG, _plain(self.config))
        return self

    def finish(self, summary: dict[str, Any]) -> Path:
        """Write ``summary.json`` and drop the checkpoint."""
        target = write_json(self.path / SUMMARY, {**summary, "environment": environment()})
        self.checkpoint.unlink(missing_ok=True)
        return target


def environment() -> dict[str, Any]:
    """Versions and hardware, for a summary."""
    return {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _plain(value: Any) -> Any:
    """The value as YAML gives it back."""
    return yaml.safe_load(yaml.safe_dump(value, sort_keys=False))


@final
class MetricsLog:
    """Appends rows of scalars. The step column comes first; a column not given in a row stays empty.

    Args:
        after: keep only the rows up to this step of what an interrupted run wrote; None starts a new file.
    """

    def __init__(self, folder: Path, columns: tuple[str, ...], after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.columns = ("step", *columns)
        path = folder / METRICS
        rows = read_metrics(path) if after is not None and path.exists() else []

        def write(target: Path) -> None:
            with target.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(row for row in rows if after is not None and int(row["step"]) <= after)

        write_whole(path, write)
        self._file = path.open("a", newline="")
        self._rows = csv.DictWriter(self._file, self.columns)
        self._board = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def log(self, step: int, **values: float) -> None:
        """One row."""
        self._rows.writerow({"step": step, **values})
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a ``metrics.csv``; a last line that a crash cut short is left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and row["step"].isdigit()]
