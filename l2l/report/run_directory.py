"""The directory of a run: who may write into it, whether it is continued, its scalars in CSV and TensorBoard.

Files are written under another name and renamed, so that each is either complete or not there. A run is continued where its
configuration, and what that names (rows, weights), are those of its beginning; one process at a time writes into a directory.
"""

import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
import yaml
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
        try:
            write(temporary)
        except (RuntimeError, SafetensorError) as error:  # of a library's writer, which does not say that the disk is full
            free = shutil.disk_usage(target.parent).free
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"{target} cannot be written ({line}); {free:,} bytes are free there") from error
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


def write_tensors(target: Path, value: Any, keep: Path | None = None, run: str = "") -> Path:
    """Write nested tensors and plain values, whole: floats, integers and types of containers come back exactly.

    Args:
        value: tensors, None, bool, int, float and str, in any nesting of dictionaries, lists and tuples.
        keep: see :func:`write_whole`.
        run: identity of the run that the file is of.

    Raises:
        TypeError: something else is in it; the message says where. Nothing is written.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _to_tree(value, "", tensors, {})
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # each begins at a multiple of its item's size
    metadata = {"name": target.name, "run": run, "value": json.dumps(tree, separators=(",", ":"))}
    shapes = {name: (tensors[name].dtype, list(tensors[name].shape)) for name in order}
    return write_whole(target, lambda path: write_sealed(path, shapes, (tensors[name] for name in order), metadata), keep)


def write_sealed(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, list[int]]],
    parts: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with a checksum over every byte of it.

    Args:
        shapes: name -> dtype and shape, in the order in the file.
        parts: the tensors in that order, each in as many parts as one likes, so that they need not be in memory together.
    """
    header: dict[str, Any] = {"__metadata__": {"sha256": _UNSET, **metadata}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        data = (part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for part in parts)
        for piece in chain((len(text).to_bytes(8, "little"), text), data):
            file.write(piece)
            digest.update(piece)
        file.seek(8 + text.index(_UNSET.encode()))
        file.write(digest.hexdigest().encode())


def read_tensors(path: Path, run: str = "") -> Any:
    """Read what :func:`write_tensors` wrote; nothing in the file is executed.

    Args:
        run: identity of the run that the file must be of; of any where it is empty.

    Raises:
        ValueError: the file is not there, cut short, changed in any bit, another one under this name, or another run's.
    """
    tensors, metadata = read_sealed(path)
    if metadata.get("name") not in (path.name, path.name.replace(EARLIER, "")):
        raise ValueError(f"{path} is not readable: it is a {metadata.get('name')} under another name")
    if run and metadata["run"] not in (run, ""):
        raise ValueError(f"{path} is not readable: it is of another run, or what the run reads has changed")
    return _from_tree(json.loads(metadata["value"]), tensors)


def read_sealed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`write_sealed` wrote.

    Tensors are mapped, not loaded: what is copied into a model's weights takes no second copy in memory.

    Raises:
        ValueError: the file is not there, cut short, or changed in any bit.
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
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + len(text) :]
        named = {code: dtype for dtype, code in DTYPES.items()}
        tensors = {
            name: data[slice(*entry["data_offsets"])].view(named[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items()
        }
        return tensors, metadata
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not readable: there is no such file") from error
    except UNREADABLE as error:
        known = str(error) if type(error) is ValueError else "it is damaged, or no file of tensors that l2l wrote"
        raise ValueError(f"{path} is not readable: {known}") from error


def _run_of(path: Path) -> str:
    """The run that a file of tensors says to be of; empty where it names none. The file may be damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return str(json.loads(file.read(min(length, path.stat().st_size)))["__metadata__"]["run"])
    except UNREADABLE:
        return ""


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
RUN, LOCK = "run.json", ".lock"
"""What identifies a run that can be continued: its configuration and what it read, with a checksum. Which process writes."""
LIBRARIES = ("torch", "transformers", "peft", "lightning", "datasets", "safetensors")
IMMATERIAL = frozenset(
    (
        *("out", "overwrite", "progress", "log_every", "checkpoint_every", "save", "loop"),
        *("processes", "executor", "ray_address", "workers", "rank_timeout"),
    )
)
"""Fields of a configuration that change how a run is executed and shown, and not what it computes."""
SHOWN = 6
"""Differences that a message lists."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)
"""Errors of file systems without locks."""
WAY_OUT_NEW = "choose another --out"
WAY_OUT = f"{WAY_OUT_NEW}, or pass --overwrite true to remove it"


@final
class RunDirectory:
    """``config.yaml``, ``metrics.csv``, TensorBoard events, ``summary.json``, a picture; a checkpoint while it runs.

    A directory belongs to one run. The same configuration again, on the same inputs (:meth:`identify`), continues where its
    checkpoint was taken. As a context manager it keeps other processes out of the directory, until the block ends.

    Args:
        config: plain values; written to ``config.yaml``. Paths count as equal where they lead to the same place.
        overwrite: remove what an earlier run left in ``path``.
        free: fields that may differ from those of the run that is continued, beside :data:`IMMATERIAL`: they change nothing
            that was computed so far, or name inputs, which :meth:`identify` compares.
        why: field -> why it may not differ, where that is not plain to see.
        again: whether a finished run may be taken up again.
        passing: names of files beside the checkpoints that are there only until the run has finished.

    Raises:
        ValueError: the directory holds another run, a finished one, or files that no run wrote. Nothing is written.
        BlockingIOError: another process writes into it.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        overwrite: bool = False,
        free: Collection[str] = (),
        why: Mapping[str, str] | None = None,
        again: bool = False,
        passing: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        """Present while the run is not finished."""
        self.earlier = self.checkpoint.with_stem(self.checkpoint.stem + EARLIER)
        """The checkpoint before, to which a run goes back where the last one is damaged."""
        self._passing = [self.earlier, self.checkpoint, *(self.path / name for name in passing)]
        self._read: tuple[Path, dict[str, Any]] | None = None
        self.config = config
        self.inputs: dict[str, Any] | None = None
        self.run = ""
        """Identity of the run, from :meth:`identify` on, of a run that is continued from the start: its files carry it."""
        self._overwrite, self._free, self._why, self._again = overwrite, frozenset(free), why or {}, again
        self._unlock: Callable[[], object] | None = None
        """While other processes are kept out."""
        self._inside = False
        self.resumed = self._continues()

    def _continues(self) -> bool:
        """Whether the directory holds a checkpoint of this run; ValueError where the run may not write into it."""
        if not self.path.is_dir() and (self.path.exists() or self.path.is_symlink()):
            raise ValueError(f"{self.path} is not a directory: {WAY_OUT_NEW}")
        if not self.path.exists():
            above = next(parent for parent in self.path.absolute().parents if parent.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise ValueError(f"{self.path} cannot be made: {above} is no directory that may be written to: {WAY_OUT_NEW}")
        if not self._entries():
            return False
        earlier = self.recorded(self.path)
        if earlier is None:
            raise ValueError(f"{self.path} holds files that no run wrote: {WAY_OUT_NEW}")
        if self._overwrite:
            for name in ("model", "tuner", "data_dir", "task"):
                given = self.config.get(name)
                if isinstance(given, str) and Path(given).exists() and self.path.resolve() in Path(given).resolve().parents:
                    raise ValueError(
                        f"--overwrite true would remove the {name} {given!r}, which lies in {self.path}: {WAY_OUT_NEW}"
                    )
            return False
        changes = differences(earlier, _plain(self.config), IMMATERIAL | self._free, self._why)
        if changes:
            raise ValueError(
                f"{self.path} holds another run: {_listed(changes)}. Choose another --out, or give the earlier values to "
                "continue that run, or pass --overwrite true to remove it"
            )
        if (self.path / SUMMARY).exists() and not self._again:
            self._tidy()
            longer = differences(earlier, _plain(self.config), IMMATERIAL)
            more = f", which leaves no checkpoint to go on from ({_listed(longer)})" if longer else ""
            raise ValueError(f"{self.path} holds this run, finished{more}: {WAY_OUT}")
        resumed = self.checkpoint.is_file() or self.earlier.is_file()
        if not resumed and (self.path / OLD_CHECKPOINT).is_file():
            raise ValueError(
                f"{self.path} holds the {OLD_CHECKPOINT} of an older release, a pickle, which is not read: finish the run with "
                f"that release, or {WAY_OUT}"
            )
        self.run = (_record(self.path) or {}).get("run", "") if resumed else ""
        return resumed

    def _tidy(self) -> None:
        """Remove what the process that finished this run had no time to remove, unless one is about to."""
        if any(path.exists() for path in (*self._passing, *self.path.glob(f"{UNFINISHED}*"), self.path / LOCK)):
            with suppress(OSError), locked(self.path):
                self._drop()

    def _drop(self) -> None:
        for path in self._passing:
            path.unlink(missing_ok=True)
        for stale in self.path.glob(f"{UNFINISHED}*"):
            shutil.rmtree(stale)

    @staticmethod
    def recorded(path: str | Path) -> dict[str, Any] | None:
        """The configuration of the run in a folder; None where no run has written one there."""
        record = _record(Path(path))
        return _settings(Path(path)) if record is None else record["config"]

    def _entries(self) -> list[Path]:
        """The files of the directory, without the lock and those that a killed process was about to write."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        return [entry for entry in found if entry.name != LOCK and not entry.name.startswith(UNFINISHED)]

    def identify(self, inputs: dict[str, Any], always: bool = False) -> "RunDirectory":
        """Compare what the run reads with what it read when it began; :meth:`create` records it.

        Args:
            inputs: plain values, nested: fingerprints of rows, weights, tuner.
            always: also where there is no checkpoint: what is continued are the parts that are done.

        Raises:
            ValueError: it is continued and reads something else; the message names what, old -> new.
        """
        self.inputs = _plain(inputs)
        known, free = self.run, IMMATERIAL | self._free
        settings = {name: value for name, value in _plain(self.config).items() if name not in free}
        self.run = known or _checksum([settings, self.inputs])
        earlier = self.recorded(self.path)
        if earlier is None or self._overwrite or not (self.resumed or always):
            return self
        record, named = _record(self.path), differences(earlier, _plain(self.config), IMMATERIAL)
        if record is None:
            logger.warning("%s is missing or damaged, or another run's: it is written anew", self.path / RUN)
            self._read = None  # as it was read before the run was known
        changes = named if record is None else differences(record["inputs"], self.inputs)
        if changes:
            what = _listed(list(dict.fromkeys(changes + named)))
            raise ValueError(
                f"{self.path} holds a run that read something else: {what}. Choose another --out to run on what is there now, "
                "or put back what it read to continue it; --overwrite true removes that run"
            )
        return self

    @contextmanager
    def trial(self, needed: int) -> Iterator[Path]:
        """An empty folder on the disk of the run, to try in it what the run will write; nothing of it is left.

        Args:
            needed: bytes that the run takes at most, with what an earlier part of it has written.

        Raises:
            ValueError: nothing can be written there, or there is not so much room.
        """
        place = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        mine = f"{UNFINISHED}{_checksum(str(self.path.absolute()))}-"
        for stale in place.glob(f"{mine}*"):  # of a killed process: it may lie outside the directory, which was not yet made
            if not _alive(int(stale.name.removeprefix(mine).partition("-")[0])):
                shutil.rmtree(stale)
        room = shutil.disk_usage(place).free + sum(
            path.stat().st_size for path in self.path.glob("*.safetensors") if path.is_file()
        )
        if needed > room:
            raise ValueError(
                f"{self.path}: the run takes up to {needed:,} bytes, and {room:,} are free there: choose another "
                "--out, make room, or, in fine-tuning, leave the model out by --save log"
            )
        try:
            folder = tempfile.TemporaryDirectory(dir=place, prefix=f"{mine}{os.getpid()}-")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written to ({error}): choose another --out") from error
        with folder as name:
            yield Path(name)

    def create(self) -> "RunDirectory":
        """Make the directory and write ``config.yaml``."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if self._overwrite:
            # The directory itself may be a link, or a disk of its own; what tells that it is a run's goes last.
            for entry in sorted(self._entries(), key=lambda entry: entry.name in (CONFIG, RUN)):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for stale in self.path.glob(f"{UNFINISHED}*"):
            shutil.rmtree(stale)
        if self.resumed and (record := _record(self.path)) is not None and _settings(self.path) != record["config"]:
            logger.warning("%s is missing or damaged, or another run's: it is written anew", self.path / CONFIG)
        if not self.resumed and (self.path / METRICS).exists():
            logger.warning("neither %s nor %s is left: the run begins anew", self.checkpoint, self.earlier)
        if self._again:
            (self.path / SUMMARY).unlink(missing_ok=True)
        config = _plain(self.config)
        write_yaml(self.path / CONFIG, config)
        if self.inputs is not None:
            record = {"config": config, "inputs": self.inputs, "run": self.run}
            write_json(self.path / RUN, record | {"checksum": _checksum(record)})
        return self

    def write(self, name: str, value: Any, keep: Path | None = None) -> Path:
        """:func:`write_tensors`, as a file of this run."""
        return write_tensors(self.path / name, value, keep, self.run)

    def read(self, name: str) -> Any:
        """:func:`read_tensors`; ValueError where the file is another run's, too."""
        return read_tensors(self.path / name, self.run)

    def is_whole(self, name: str, otherwise: str) -> bool:
        """Whether :meth:`read` reads the file. Where a run is continued and it does not, a line says what is done
        ``otherwise``."""
        try:
            self.read(name)
        except ValueError as error:
            if self.resumed:
                logger.warning("%s; %s", error, otherwise)
            return False
        return True

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state of the run; the last checkpoint becomes the earlier one."""
        self.write(CHECKPOINT, state, self.earlier)

    def read_checkpoint(self, check: Callable[[dict[str, Any]], object] = bool) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint that is whole, and its state; says in a line where that is the earlier one.

        Args:
            check: called when it is first read; raises ValueError where the run cannot go on from there.

        Raises:
            ValueError: there is none.
        """
        if self._read is None:
            reasons: list[str] = []
            for path in (self.checkpoint, self.earlier):
                try:
                    state = self.read(path.name)
                    check(state)
                except ValueError as error:
                    reasons.append(str(error))
                    continue
                for reason in reasons:
                    logger.warning("%s; continuing from the one before, %s", reason, path.name)
                self._read = path, state
                break
            else:
                why = ", and ".join(dict.fromkeys(reasons))
                way_out = "choose another --out, or pass --overwrite true to begin again"
                raise ValueError(f"no checkpoint is left: {why}; {way_out}")
        return self._read

    def finish(self, summary: dict[str, Any]) -> Path:
        """Write ``summary.json``, then drop the checkpoints and the files of an unfinished run."""
        target = write_json(self.path / SUMMARY, {**summary, "environment": environment()})
        self._read = None
        self._drop()
        if not self._inside:
            self.release()
        return target

    def __enter__(self) -> "RunDirectory":
        self._inside = True
        if self.path.is_dir() and self._entries():
            self._take()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._inside = False
        self.release()
        if (
            isinstance(error, OSError)
            and not isinstance(error, BlockingIOError)
            and (self.checkpoint.is_file() or self.earlier.is_file())
        ):
            error.add_note(f"the last checkpoint in {self.path} is whole: the same command continues from it")

    def _take(self) -> None:
        """Keep other processes out, unless that is done."""
        if self._unlock is None:
            self._unlock = weakref.finalize(self, unlock_directory, self.path, lock_directory(self.path))
            if self._continues() != self.resumed:
                self.release()
                raise BlockingIOError(f"another process has written into {self.path} meanwhile: run the same command again")

    def release(self) -> None:
        """Let other processes in."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None


def differences(
    old: Any, new: Any, free: Collection[str] = (), why: Mapping[str, str] | None = None, name: str = ""
) -> list[str]:
    """``name: old -> new`` for each of two nested plain values that differ. What one lacks is None.

    Args:
        free: names that do not count, at any depth.
        why: name -> what to add in brackets.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = {f"{name} {key}".strip(): key for key in {**old, **new} if key not in free}
        return [line for path, key in pairs.items() for line in differences(old.get(key), new.get(key), free, why, path)]
    if old == new or (isinstance(old, str) and isinstance(new, str) and _same_place(old, new)):
        return []
    reason = (why or {}).get(name)
    return [f"{name}: {_short(old)} -> {_short(new)}" + (f" ({reason})" if reason else "")]


def _same_place(one: str, other: str) -> bool:
    """Whether two paths lead to the same file or folder."""
    try:
        return os.path.samefile(os.path.expanduser(one), os.path.expanduser(other))
    except (OSError, ValueError):
        return False


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(changes: list[str]) -> str:
    more = len(changes) - SHOWN
    return "; ".join(changes[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _settings(folder: Path) -> dict[str, Any] | None:
    """Content of ``config.yaml``; None where it is not that of a run."""
    try:
        found = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, ValueError, yaml.YAMLError):  # ValueError: not text
        return None
    return found if isinstance(found, dict) and "out" in found else None


def _record(folder: Path) -> dict[str, Any] | None:
    """Content of ``run.json``; None where there is none, it is not as it was written, or all files there are another run's."""
    try:
        found = json.loads((folder / RUN).read_text())
        checksum = found.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    named = {_run_of(path) for path in folder.glob("*.safetensors")} - {""}
    return found if checksum == _checksum(found) and (not named or found.get("run") in named) else None


def lock_directory(folder: Path) -> int:
    """Keep other processes out of a folder; a file descriptor, for :func:`unlock_directory`. The system frees the lock when the
    process ends, killed too; what it said of itself is then left behind, and does no harm.

    Raises:
        BlockingIOError: another process has it; the message says which.
    """
    path, here = folder / LOCK, socket.gethostname()
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # to be written: network file systems lock no other files
        try:
            held = _locked(file)
            process, host = _holder(file)
            if held is False or (held is None and host == here and _alive(process)):
                who = f"process {process} on {host}" if process else "another process"
                raise BlockingIOError(f"{who} writes into {folder}: choose another --out, or wait until it has ended")
            if held is None or (path.exists() and os.path.samestat(os.fstat(file), path.stat())):
                break
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder has removed it meanwhile
    if host not in ("", here):  # some network file systems lock on each machine by itself
        logger.warning("process %d on %s did not take its leave of %s: make sure that it has ended", process, host, folder)
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": here}).encode(), 0)
    return file


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make a folder, and keep other processes out of it inside; BlockingIOError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = lock_directory(folder)
    try:
        yield folder
    finally:
        unlock_directory(folder, file)


def unlock_directory(folder: Path, file: int) -> None:
    """Let other processes into a folder."""
    (folder / LOCK).unlink(missing_ok=True)  # before it is free, so that nobody else's is removed
    os.close(file)


def _holder(file: int) -> tuple[int, str]:
    """Process and machine that a lock names; 0 and nothing where it names none."""
    try:
        found = json.loads(os.read(file, 1000))
        return int(found["pid"]), str(found["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def _locked(file: int) -> bool | None:
    """Whether the file could be locked; None on file systems without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _alive(process: int) -> bool:
    """Whether there is such a process on this machine, other than this one."""
    if process in (0, os.getpid()):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


class Stopped(KeyboardInterrupt):
    """A run has ended before its end because it was asked to, at a step's boundary. ``number`` is the signal's."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


@final
class StopRequest:
    """What Ctrl-C and SIGTERM have asked for: the first is noted, so that a loop ends at a step's boundary; the next one raises
    KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Of the first signal; None: none has come."""
        self.active = False
        """Whether its handlers are set."""
        self.ignores = False
        """Whether Ctrl-C is ignored, as in a shell's background jobs."""
        self._twice = False

    def note(self, number: int, frame: object) -> None:
        """The handler of both signals."""
        if number == signal.SIGINT and self.ignores and not self._twice:
            return
        if self.number is None:
            self.number = number
            print("\nl2l: finishing the step and saving; once more to stop at once", file=sys.stderr)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:  # as a Ctrl-C, which code that must not be interrupted holds back
            self._twice = True
            signal.raise_signal(signal.SIGINT)

    def install(self) -> None:
        """Set the handlers once more where they are active: some libraries replace them."""
        for number in (signal.SIGINT, signal.SIGTERM) if self.active else ():
            signal.signal(number, self.note)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, signals are noted; except in threads, and in workers that have handlers of their own."""
    request, numbers = StopRequest(), (signal.SIGINT, signal.SIGTERM)
    main, handler = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    if not main or handler not in (signal.default_int_handler, signal.SIG_IGN):
        yield request
        return
    request.ignores = handler is signal.SIG_IGN
    before = [(number, signal.getsignal(number)) for number in numbers]
    request.active = True
    request.install()
    try:
        yield request
    finally:
        for number, handler in before:
            signal.signal(number, handler)


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
        known: :attr:`extent` at that step: a file that is damaged up to there is named, and its readable rows are kept.
    """

    def __init__(
        self, folder: Path, columns: tuple[str, ...], after: int | None = None, known: Sequence[int] | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.columns = ("step", *columns)
        path = folder / METRICS
        content = path.read_bytes() if after is not None and path.is_file() else b""
        if known is not None and [len(content[: known[0]]), zlib.crc32(content[: known[0]])] != list(known):
            logger.warning("%s is missing or damaged: the rows of it that are readable are kept", path)
        rows = [row for row in _parsed(content.decode(errors="replace"), self.columns) if int(row["step"]) <= (after or 0)]

        def write(target: Path) -> None:
            with target.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_whole(path, write)
        self._extent = len(content := path.read_bytes()), zlib.crc32(content)
        self._file = path.open("a", newline="")
        self._board = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    @property
    def extent(self) -> list[int]:
        """Bytes of the file, and their checksum."""
        return list(self._extent)

    def log(self, step: int, **values: float) -> None:
        """One row."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerow({"step": step, **values})
        line = text.getvalue()
        self._file.write(line)
        self._file.flush()
        self._extent = self._extent[0] + len(line), zlib.crc32(line.encode(), self._extent[1])
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


def clock(folder: Path) -> list[tuple[float, float]]:
    """(passes spent, seconds of training by then) of a run, from 0 to its end."""
    return [(0.0, 0.0), *((float(row["passes"]), float(row["seconds"])) for row in read_metrics(folder / METRICS))]


def _parsed(text: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The lines of a ``metrics.csv`` that are rows: a step, and a number or nothing in each other column."""
    for line in text.splitlines():
        values = line.split(",")
        if len(values) == len(columns) and values[0].isascii() and values[0].isdigit():
            with suppress(ValueError):
                for value in filter(None, values):
                    float(value)
                yield dict(zip(columns, values, strict=True))
