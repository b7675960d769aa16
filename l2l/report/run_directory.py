"""The directory of a run: who may write into it, whether it is continued, its scalars in CSV and TensorBoard.

Files are written under another name and renamed, so that each is either complete or not there.
"""

import csv
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
import yaml

logger = logging.getLogger(__name__)

UNFINISHED = ".writing-"
"""How the folders begin in which files are written before they take their names."""


def write_whole(target: Path, write: Callable[[Path], Any], keep: Path | None = None) -> Path:
    """Let ``write`` fill a temporary file beside ``target``, then rename it: an interruption leaves the old file.

    Args:
        keep: the name that the old file takes in the moment in which it is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED) as folder:
        temporary = Path(folder) / target.name
        write(temporary)
        temporary.chmod(_usual_mode(Path(folder)))
        if keep is not None and target.exists():
            target.replace(keep)
        temporary.replace(target)
    return target


def _usual_mode(folder: Path) -> int:
    """The permissions that a new file gets in a folder, by the umask and the folder's own rules."""
    probe = folder / ".mode"
    probe.touch()
    found = probe.stat().st_mode & 0o777
    probe.unlink()
    return found


def share_as_usual(folder: Path) -> None:
    """Give every file below a folder the permissions of a new file; safetensors writes for the owner only."""
    mode = _usual_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def write_json(target: Path, value: Any) -> Path:
    """Write JSON, whole. NaN is written as it is, never masked."""
    return write_whole(target, lambda path: path.write_text(json.dumps(value, indent=1) + "\n"))


def write_yaml(target: Path, value: Any, header: str = "") -> Path:
    """Write YAML, whole, in the order of the mapping."""
    return write_whole(target, lambda path: path.write_text(header + yaml.safe_dump(value, sort_keys=False)))


# Nested tensors and plain values, as one safetensors file: any reader of that format finds the tensors under the names of
# their places, ``optimizer/state/0``, and the values around them as JSON in the metadata. It is written here because the
# library copies every tensor before it writes, where a checkpoint may be as large as what is left of the memory.

DTYPES = {
    **{getattr(torch, f"float{bits}"): f"F{bits}" for bits in (16, 32, 64)},
    **{
        getattr(torch, f"{kind}int{bits}"): f"{kind[:1].upper() or 'I'}{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)
    },
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
}
"""Types of tensors, as safetensors names them."""
_UNSET = "0" * 64
"""Stands for the checksum while it is computed, over every byte of the file."""
_CHUNK = 1 << 22
"""Bytes read at a time for a checksum."""


def write_tensors(target: Path, value: Any, keep: Path | None = None) -> Path:
    """Write nested tensors and plain values, whole: floats, integers and types of containers come back exactly.

    Args:
        value: tensors, None, bool, int, float and str, in any nesting of dictionaries, lists and tuples.
        keep: see :func:`write_whole`.

    Raises:
        TypeError: something else is in it; the message says where. Nothing is written.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _to_tree(value, "", tensors, {})
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # each begins at a multiple of its item's size
    metadata = {"name": target.name, "sha256": _UNSET, "value": json.dumps(tree, separators=(",", ":"))}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(path: Path) -> None:
        digest = hashlib.sha256()
        with path.open("wb") as file:
            parts = (tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for name in order)
            for part in (len(text).to_bytes(8, "little"), text, *parts):
                file.write(part)
                digest.update(part)
            file.seek(8 + text.index(_UNSET.encode()))
            file.write(digest.hexdigest().encode())

    return write_whole(target, write, keep)


def read_tensors(path: Path) -> Any:
    """Read what :func:`write_tensors` wrote; nothing in the file is executed.

    Tensors are mapped, not loaded: what is copied into a model's weights takes no second copy in memory.

    Raises:
        ValueError: the file is not there, cut short, changed in any bit, or another one under this name.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = file.read(8)
            text = file.read(min(int.from_bytes(length, "little"), size))
            if len(length) + len(text) < 8 + int.from_bytes(length, "little"):
                raise ValueError(f"its {size} bytes are cut short, or no file of tensors")
            header = json.loads(text)
            metadata = header.pop("__metadata__")
            end = 8 + len(text) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if size != end:
                raise ValueError(f"it has {size} bytes of {end}")
            digest = hashlib.sha256(length + text.replace(metadata["sha256"].encode(), _UNSET.encode(), 1))
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != metadata["sha256"]:
            raise ValueError("its checksum is another one")
        if metadata["name"] not in (path.name, path.name.replace(EARLIER, "")):
            raise ValueError(f"it is a {metadata['name']} under another name")
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + len(text) :]
        named = {code: dtype for dtype, code in DTYPES.items()}
        tensors = {
            name: data[slice(*entry["data_offsets"])].view(named[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items()
        }
        return _from_tree(json.loads(metadata["value"]), tensors)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not readable: there is no such file") from error
    except UNREADABLE as error:
        known = str(error) if type(error) is ValueError else "it is damaged, or no file of tensors that l2l wrote"
        raise ValueError(f"{path} is not readable: {known}") from error


def is_whole(path: Path, otherwise: str) -> bool:
    """Whether :func:`read_tensors` reads the file. Where it is there and damaged, a line says what is done ``otherwise``."""
    try:
        read_tensors(path)
    except ValueError as error:
        if path.exists():
            logger.warning("%s; %s", error, otherwise)
        return False
    return True


UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""What arbitrary bytes raise where a header is expected. RuntimeError: tensors that overlap their file."""
_PLAIN = (bool, int, float, str, type(None))


def _to_tree(value: Any, place: str, tensors: dict[str, torch.Tensor], known: dict[Any, str]) -> Any:
    """The value for JSON: plain values and lists as they are, all else as ``{kind: content}``. Tensors go into ``tensors``."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.dtype not in DTYPES:
            raise TypeError(f"a checkpoint cannot hold the {value.dtype} {value.layout} tensor at {place!r}")
        identity = value.data_ptr(), value.dtype, value.shape, value.stride()
        if identity not in known or not value.numel():  # tensors that are one stay one
            while place in tensors or place in ("", "__metadata__"):
                place += "_"
            tensors[place] = value.detach()
            known[identity] = place
        return {"tensor": known[identity]}
    inside = f"{place}/" if place else ""
    if isinstance(value, dict):
        pairs = ((_to_tree(key, f"{inside}key", tensors, known), key) for key in value)
        return {"dict": [[key, _to_tree(value[name], f"{inside}{name}", tensors, known)] for key, name in pairs]}
    if isinstance(value, list | tuple):
        found = [_to_tree(one, f"{inside}{number}", tensors, known) for number, one in enumerate(value)]
        return {"tuple": found} if isinstance(value, tuple) else found
    if not isinstance(value, _PLAIN):
        raise TypeError(f"a checkpoint holds tensors and plain values, and at {place!r} is a {type(value).__name__}: {value!r}")
    return value


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(tensor_bytes, inside))


def _from_tree(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value of which :func:`_to_tree` made a tree."""
    if isinstance(tree, list):
        return [_from_tree(one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_from_tree(one, tensors) for one in content)
    return {_from_tree(key, tensors): _from_tree(value, tensors) for key, value in content}


CONFIG, SUMMARY, METRICS, CHECKPOINT = "config.yaml", "summary.json", "metrics.csv", "checkpoint.safetensors"
EARLIER = ".1"
"""In the name of the checkpoint before the last one: ``checkpoint.1.safetensors``."""
OLD_CHECKPOINT = "checkpoint.pt"
"""Of releases whose checkpoints were pickles."""
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
        self.earlier = self.checkpoint.with_stem(self.checkpoint.stem + EARLIER)
        """The checkpoint before, to which a run goes back where the last one is damaged."""
        self._read: tuple[Path, dict[str, Any]] | None = None
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
            for name in ("model", "tuner", "data_dir", "task"):
                given = config.get(name)
                if isinstance(given, str) and Path(given).exists() and self.path.resolve() in Path(given).resolve().parents:
                    raise ValueError(
                        f"--overwrite true would remove the {name} {given!r}, which lies in {self.path}: choose another --out"
                    )
            return
        if earlier != _plain(config):
            raise ValueError(f"{self.path} holds another run (its {CONFIG} differs): {way_out}")
        if (self.path / SUMMARY).exists():
            raise ValueError(f"{self.path} holds this run, finished: {way_out}")
        self.resumed = self.checkpoint.is_file() or self.earlier.is_file()
        if not self.resumed and (self.path / OLD_CHECKPOINT).is_file():
            raise ValueError(
                f"{self.path} holds the {OLD_CHECKPOINT} of an older release, a pickle, which is not read: finish the run with "
                f"that release, or {way_out}"
            )

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

    @contextmanager
    def trial(self, needed: int) -> Iterator[Path]:
        """An empty folder on the disk of the run, to try in it what the run will write; nothing of it is left.

        Args:
            needed: bytes that the run takes at most, with what an earlier part of it has written.

        Raises:
            ValueError: nothing can be written there, or there is not so much room.
        """
        place = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        room = shutil.disk_usage(place).free + sum(path.stat().st_size for path in self.path.glob("*.safetensors"))
        if needed > room:
            raise ValueError(
                f"{self.path}: the run takes up to {needed:,} bytes, and {room:,} are free there: make room, choose another "
                "--out, or, in fine-tuning, leave the model out by --save log"
            )
        try:
            folder = tempfile.TemporaryDirectory(dir=place, prefix=UNFINISHED)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written to ({error}): choose another --out") from error
        with folder as name:
            yield Path(name)

    def create(self) -> "RunDirectory":
        """Make the directory and write ``config.yaml``."""
        if self._overwrite and self._entries():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in self.path.glob(f"{UNFINISHED}*"):
            shutil.rmtree(stale)
        write_yaml(self.path / CONFIG, _plain(self.config))
        return self

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state of the run; the last checkpoint becomes the earlier one."""
        write_tensors(self.checkpoint, state, keep=self.earlier)

    def read_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint that is whole, and its state; says in a line where that is the earlier one.

        Raises:
            ValueError: there is none.
        """
        if self._read is None:
            try:
                self._read = self.checkpoint, read_tensors(self.checkpoint)
            except ValueError as error:
                way_out = "choose another --out, or pass --overwrite true to begin again"
                try:
                    self._read = self.earlier, read_tensors(self.earlier)
                except ValueError as second:
                    raise ValueError(f"no checkpoint is left: {error}, and {second}; {way_out}") from error
                logger.warning("%s; continuing from the one before, %s", error, self.earlier.name)
        return self._read

    def finish(self, summary: dict[str, Any]) -> Path:
        """Write ``summary.json`` and drop the checkpoints."""
        target = write_json(self.path / SUMMARY, {**summary, "environment": environment()})
        self._read = None
        for path in (self.earlier, self.checkpoint):
            path.unlink(missing_ok=True)
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
