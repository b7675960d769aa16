"""Where tuners come from: directories, bundled ones, registries of names, the hub; downloads into the cache.

A registry is JSON: ``{"registry_version": 1, "tuners": {name: entry}}`` with the fields of :class:`Entry`. The package has
one, and users may have theirs. Loading by name opens no connection unless the name is a hub id; ``l2l tuners download``
fetches. From the hub only config and safetensors are fetched, never a pickle.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, replace
from http.client import HTTPException, HTTPResponse
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from l2l.tuners import io
from l2l.tuners.card import UNKNOWN, brief
from l2l.tuners.io import CONFIG, WEIGHTS, sha256_of
from l2l.tuners.model import TunerModel
from l2l.tuners.published import import_published

VERSION = 1
OWN = Path(__file__).with_name("registry.json")
VARIABLE = "L2L_REGISTRY"
"""Environment variable: path of a further registry, in place of ``~/.config/l2l/registry.json``."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
ADDRESS = re.compile(r"https?://[^\s/]+/\S+")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CHECKSUM = re.compile(r"[0-9a-f]{64}")
TEXT = re.compile(".*", re.DOTALL)
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt")
CHUNK = 1 << 16
"""Bytes that are read from a connection at a time."""
PATIENCE = 30.0
"""Seconds without a byte after which a connection is given up."""
ATTEMPTS = 5
"""Connections in a row that may break off without a further byte."""

Format = Literal["l2l", "published"]
Report: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes received so far, and with their number in the end, if it is known."""


@dataclass(frozen=True)
class Entry:
    """A tuner in a registry: where it is, and what it must be; ValueError where a field may not have its value."""

    name: str
    sha256: str
    """Of ``tuner.safetensors``, or of the published file."""
    base_model: str
    licence: str
    """SPDX name, or ``unknown``."""
    format: Format = "l2l"
    """``published``: a file as the paper's authors published it, which is imported."""
    url: str | None = None
    """Address of a published file, or of the folder of an l2l tuner; else the next, or the one after it, is given."""
    hub: str | None = None
    bundled: str | None = None
    revision: str | None = None
    """Commit; pinned for everything that is fetched from a hub."""
    config_sha256: str | None = None
    """Of ``config.json``; needed for an l2l tuner at a url."""
    size: int | None = None
    """Bytes of the file that ``sha256`` is of; more are never fetched."""
    blocks: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        published = self.format == "published"
        texts = {
            "name": (NAME, True, "begin with a letter or digit; -, _ and . may follow"),
            "hub": (HUB_ID, False, "look like user/name"),
            "bundled": (NAME, False, "name a bundled folder"),
            "revision": (TEXT, self.hub is not None, "pin the commit of a hub repository"),
            "url": (ADDRESS, published, "begin with http[s]://"),
            "sha256": (CHECKSUM, True, "be 64 hexadecimal digits"),
            "config_sha256": (CHECKSUM, bool(self.url) and not published, "be 64 hexadecimal digits for a tuner at a url"),
            **dict.fromkeys(("base_model", "licence", "note"), (TEXT, True, "be a string")),
        }
        wrong = [("format", "be l2l or published")] if self.format not in get_args(Format) else []
        if sum(value is not None for value in (self.url, self.hub, self.bundled)) != 1:
            wrong.append(("source", "be exactly one of url, hub and bundled"))
        for name, (pattern, needed, rule) in texts.items():
            value = getattr(self, name)
            if (needed or value is not None) and not (isinstance(value, str) and pattern.fullmatch(value)):
                wrong.append((name, rule))
        for name, value in (("size", self.size), ("blocks", self.blocks)):
            if value is not None and not (type(value) is int and value > 0):
                wrong.append((name, "be a whole number"))
        for field, rule in wrong:
            raise ValueError(f"registry entry {self.name!r}: {field} is {getattr(self, field, None)!r}; it must {rule}")

    @property
    def folder(self) -> Path:
        """Its folder in the cache; named with the checksum, so that a changed entry does not find the tuner of before."""
        return cache_folder() / f"{self.name}-{self.sha256[:12]}"

    def ready(self) -> Path | None:
        """The folder of the tuner on this machine; None: it has to be downloaded."""
        if self.hub is not None:
            from huggingface_hub import try_to_load_from_cache

            files = [try_to_load_from_cache(self.hub, name, revision=self.revision) for name in (WEIGHTS, CONFIG)]
            return Path(files[0]).parent if isinstance(files[0], str) and isinstance(files[1], str) else None
        folder = self.folder if self.bundled is None else io.bundled_folder() / self.bundled
        return folder if (folder / CONFIG).is_file() else None

    def obtain(self, report: Report) -> Path:
        """Fetch the tuner; its folder, which takes its name when it is complete."""
        if self.hub is not None:
            return _checked(hub_folder(self.hub, self.revision), self.sha256)
        if self.url is None:
            raise FileNotFoundError(f"the bundled tuner {self.name!r} is not in {io.bundled_folder()}: install l2l again")
        parts = cache_folder() / "downloads"
        if self.format == "published":
            file = parts / f"{self.sha256[:12]}-{re.sub(r'[^A-Za-z0-9._-]', '_', self.url.rpartition('/')[2])[-80:]}"
            fetch(self.url, file, self.sha256, self.size, report)
            import_published(file, self.base_model, self.folder)
            file.unlink()
            return self.folder
        parts = parts / self.folder.name
        fetch(f"{self.url.rstrip('/')}/{CONFIG}", parts / CONFIG, self.config_sha256 or "", report=report)
        fetch(f"{self.url.rstrip('/')}/{WEIGHTS}", parts / WEIGHTS, self.sha256, self.size, report)
        return parts.replace(self.folder)


def cache_folder() -> Path:
    """Folder of downloaded tuners: below ``L2L_CACHE``, or ``~/.cache/l2l``."""
    given = os.environ.get("L2L_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "l2l") / "tuners"


def entries() -> dict[str, Entry]:
    """All entries by name: those of the package, then those of the user, who may replace them.

    Raises:
        FileNotFoundError: the environment names a registry that is not there.
        ValueError: see :func:`read_registry`.
    """
    given = os.environ.get(VARIABLE)
    user = Path(given) if given else Path.home() / ".config" / "l2l" / "registry.json"
    if given and not user.is_file():
        raise FileNotFoundError(f"{VARIABLE} names {given!r}, which is no file: correct it, or unset it")
    return read_registry(OWN) | (read_registry(user) if user.is_file() else {})


def read_registry(path: Path) -> dict[str, Entry]:
    """The entries of one registry; ValueError where it is not readable, or an entry does not fit."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable registry of tuners ({error}): mend or remove it") from error
    if not isinstance(value, dict) or value.get("registry_version") != VERSION:
        raise ValueError(f"{path} is not a registry of version {VERSION}: its 'registry_version' says otherwise")
    tuners = value.get("tuners")
    if not isinstance(tuners, dict) or not all(isinstance(entry, dict) for entry in tuners.values()):
        raise ValueError(f"{path} has no table of 'tuners': each name needs an entry")
    known = {field.name: field.default is MISSING for field in fields(Entry) if field.name != "name"}
    for name, entry in tuners.items():
        unknown = sorted(set(entry) - set(known))
        lacking = [field for field, needed in known.items() if needed and field not in entry]
        if unknown or lacking:
            what = f"has no field {unknown[0]!r}" if unknown else f"lacks {lacking[0]!r}"
            raise ValueError(f"{path}: an entry {what} ({name!r}); the fields are {', '.join(known)}")
    return {name: Entry(name, **entry) for name, entry in tuners.items()}


def find(name: str) -> Entry | None:
    """The entry of that name, or None. ``l2l/tiny`` finds ``l2l-tiny``."""
    found = entries()
    return found.get(name) or found.get(name.replace("/", "-"))


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a tuner by its path, bundled name, registered name or hub id; only a hub id is fetched.

    Raises:
        FileNotFoundError: there is none of that name, or it has to be downloaded; the message lists the places searched.
    """
    bundled = io.bundled_folder() / name.replace("/", "-")
    known = (bundled / CONFIG).is_file()
    # a folder without weights may be that of the model, which has the name of its tuner
    if Path(name).is_dir() and not (known and not (Path(name) / WEIGHTS).exists()):
        return Path(name)
    if known:
        return bundled
    if revision is None and (entry := find(name)) is not None:
        if (folder := entry.ready()) is not None:
            return folder
        raise FileNotFoundError(f"tuner {name!r} is known, but not here yet: run `l2l tuners download {name}`")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        have = ", ".join(sorted(path.parent.name for path in io.bundled_folder().glob(f"*/{CONFIG}"))) or "none"
        places = f"it is not a directory, not bundled ({have}), not in a registry (`l2l tuners list`), and not a hub id"
        raise FileNotFoundError(f"no tuner {name!r}: {places}")
    return hub_folder(name, revision)


def download(name: str, revision: str | None = None, sha256: str | None = None, report: Report = lambda *_: None) -> Path:
    """Fetch a tuner into the cache, if it is not there; its folder. A published file is imported, nothing in it is executed.

    Args:
        revision: commit, branch or tag of a hub tuner.
        sha256: that its ``tuner.safetensors`` must have.

    Raises:
        FileNotFoundError: there is none of that name, or it cannot be reached.
        ValueError: it has another checksum, and was removed; or an argument contradicts the registry.
    """
    if sha256 is not None and not CHECKSUM.fullmatch(sha256):
        raise ValueError(f"sha256 is {sha256!r}; it must be 64 hexadecimal digits")
    if (entry := find(name)) is not None:
        if revision not in (None, entry.revision) or sha256 not in (None, entry.sha256):
            raise ValueError(f"the registry pins {name!r} to {entry.revision}, sha256 {entry.sha256}: leave yours out")
        return entry.ready() or entry.obtain(report)
    if name.count("/") != 1:
        raise FileNotFoundError(f"no tuner {name!r}: it is in no registry ({', '.join(entries())}), and not a hub id")
    found = hub_folder(name, revision)
    return found if sha256 is None else _checked(found, sha256)


def _checked(folder: Path, sha256: str) -> Path:
    """The folder, if its weights have that checksum; else they are removed."""
    file = folder / WEIGHTS
    if (found := sha256_of(file)) != sha256:
        file.resolve().unlink()  # in the hub's cache it is a link
        file.unlink(missing_ok=True)
        raise ValueError(f"{file.name} has sha256 {found}, but {sha256} was asked for: it was removed")
    return folder


def download_with_progress(name: str, revision: str | None, sha256: str | None, visible: bool = True) -> Path:
    """:func:`download` with a progress bar, which appears with the first bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), disable=not visible)

    def report(have: int, total: int | None) -> None:
        if not bar.tasks:
            bar.add_task(name, total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=have, total=total)

    try:
        return download(name, revision, sha256, report)
    finally:
        if bar.tasks:
            bar.stop()


# Fetching a file is ours because pooch begins again where a transfer breaks off; published tuners have megabytes.


def fetch(url: str, target: Path, sha256: str, size: int | None = None, report: Report = lambda *_: None) -> Path:
    """The file at ``url`` as ``target``; bytes that are there already are used.

    A transfer that breaks off is continued, in this call and in the next one, where the server can do so; else it begins
    again. A part that turns out to belong to another file is thrown away, once.

    Args:
        size: more bytes than this are refused.

    Raises:
        FileNotFoundError: the server cannot be reached, has no such file, or broke off again and again.
        ValueError: the file has another checksum; it is removed.
    """
    if target.is_file() and sha256_of(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target, sha256)
    continued = part.exists()
    if continued and sha256_of(part) == sha256:  # interrupted between the last byte and the rename
        return part.replace(target)
    _receive(url, part, size, report)
    if sha256_of(part) != sha256 and continued:
        part.unlink()
        _receive(url, part, size, report)
    if (found := sha256_of(part)) != sha256:
        part.unlink()
        wrong = f"{url} has sha256 {found}, but {sha256} was asked for"
        raise ValueError(f"{wrong}: the file is not the one that was checked, and was removed")
    return part.replace(target)


def part_of(target: Path, sha256: str) -> Path:
    """The file in which bytes are collected; the checksum in its name says of which file."""
    return target.with_name(f".{target.name}.{sha256[:12]}.part")


def _receive(url: str, part: Path, size: int | None, report: Report) -> None:
    """Connect until the file is complete, or connections bring no byte more."""
    failures, have = 0, part.stat().st_size if part.exists() else 0
    while failures < ATTEMPTS:
        if _transfer(url, part, have, size, report):
            return
        before, have = have, part.stat().st_size if part.exists() else 0
        failures = 0 if have > before else failures + 1
    broken = f"{url} broke off {ATTEMPTS} times in a row"
    raise FileNotFoundError(f"{broken}; {have} bytes are kept: run the same command again later")


def _transfer(url: str, part: Path, have: int, size: int | None, report: Report) -> bool:
    """One connection; whether the file is complete after it."""
    with _open(url, have) as response:
        at = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not (response.status == 206 and at and int(at[1]) == have):
            have = 0  # the server begins again
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with part.open("ab" if have else "wb") as file:
            while True:
                try:
                    chunk = response.read(CHUNK)
                except (OSError, HTTPException):
                    return False  # the connection broke off
                have += len(chunk)
                if size is not None and max(have, total or 0) > size:
                    part.unlink()
                    raise ValueError(
                        f"{url} gives more than the {size} bytes that the file has: it is another, and was removed"
                    )
                if not chunk:
                    return total is None or have >= total
                file.write(chunk)
                report(have, total)


def _open(url: str, have: int) -> HTTPResponse:
    headers = {"Accept-Encoding": "identity", "User-Agent": "l2l"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=PATIENCE)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # the part is longer than the server's file
            return _open(url, 0)
        raise FileNotFoundError(f"{url} is not to be had: the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        way = "run the command where there is a network and copy the folder that it prints, or give the directory of a tuner"
        raise FileNotFoundError(f"{url} cannot be reached ({getattr(error, 'reason', error)}): {way}") from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's client, which logs each failed try in two lines; our error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_folder(repo_id: str, revision: str | None) -> Path:
    """A folder with a hub tuner's weights and config: from the hub's cache, else downloaded into it.

    Raises:
        FileNotFoundError: there is no such tuner, or the hub cannot be reached.
        ValueError: the repository holds a pickle in place of a tuner.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with _quiet_hub():
            files = [Path(hf_hub_download(repo_id, name, revision=revision)) for name in (CONFIG, WEIGHTS)]
        return files[1].parent
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"tuner {repo_id!r} is not in the local cache and the hub cannot be reached: run `l2l tuners download "
            f"{repo_id}` where there is a network, or give a directory"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        found: list[str] = []
        if isinstance(error, EntryNotFoundError):
            with suppress(HfHubHTTPError):  # then the first error is reported
                found = sorted(HfApi().list_repo_files(repo_id, revision=revision))
        if pickles := [name for name in found if name.endswith(PICKLES)]:
            raise ValueError(
                f"the hub repository {repo_id!r} holds no tuner.safetensors, but the pickle {pickles[0]!r}, which could "
                f"run code: it is not loaded. Get it with `hf download {repo_id} {pickles[0]}`, then `l2l tuners import "
                "FILE --base-model ID --out DIR` reads its numbers without executing anything"
            ) from error
        raise FileNotFoundError(f"no tuner {repo_id!r} on the hub: {str(error).splitlines()[0]}") from error


def push(tuner: TunerModel, repo_id: str, private: bool, revision: str | None, licence: str | None = None) -> str:
    """Upload a tuner's three files in one commit: see :meth:`l2l.Tuner.push_to_hub`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable = import_module("huggingface_hub.errors").HTTPError  # of its HTTP client, whichever that is
    known = tuner.provenance
    stated = known.recipe.get("licence")
    if licence is not None:
        tuner = replace(tuner, provenance=replace(known, recipe=known.recipe | {"licence": licence}))
    elif isinstance(stated, str) and stated.startswith(UNKNOWN):
        way = "With its authors' leave, name the licence with --licence"
        raise ValueError(f"the licence of this tuner is {stated}: it is not pushed. {way}")
    if Path(known.base_model).is_absolute() or known.base_model.startswith("."):
        raise ValueError(
            f"the tuner says that its model is {known.base_model!r}, a directory that others do not have: name the model "
            "with `l2l tuners card DIR --base_model ID` before it is pushed"
        )
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        io.save(tuner, Path(folder))
        try:
            with _quiet_hub():
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision).commit_url)
        # RuntimeError: an upload broke off; ConnectionError: HF_HUB_OFFLINE is set
        except (HfHubHTTPError, HFValidationError, RuntimeError, unreachable, ConnectionError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, HfHubHTTPError | HFValidationError | RuntimeError):
                text = f"the hub did not take {repo_id!r} ({line}): log in with `hf auth login`, and name a repository of yours"
            else:
                text = f"the hub cannot be reached ({line}), so nothing was pushed: run the command where there is a network"
            raise ValueError(text) from error


def tuner_rows() -> list[dict[str, str]]:
    """A row per bundled or registered tuner: name, place, base model, blocks, size, licence, results.

    Nothing is downloaded and no weights are read. ValueError where a registry is not readable.
    """
    found: list[tuple[str, Path | None, Entry | None]] = [(name, one.ready(), one) for name, one in entries().items()]
    known = {name for name, _, _ in found}
    folders = [path.parent for path in sorted(io.bundled_folder().glob(f"*/{CONFIG}"))]
    rows: list[dict[str, str]] = []
    for name, folder, entry in found + [(folder.name, folder, None) for folder in folders if folder.name not in known]:
        config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text()) if folder else {}
        size = (folder / WEIGHTS).stat().st_size if folder else entry.size if entry else None
        blocks = len(config["blocks"]) if config else entry.blocks if entry else None
        bundled = entry is None or entry.bundled is not None
        row = {"name": name, "where": "remote" if folder is None else "bundled" if bundled else "cached"}
        row["base model"] = entry.base_model if entry else config["base_model"]
        row["blocks"] = "-" if blocks is None else str(blocks)
        row["size"] = "-" if size is None else f"{size} B" if size < 1024 else f"{size / 1024:.0f} KiB"
        if size is not None and size >= 1 << 20:
            row["size"] = f"{size / (1 << 20):.1f} MiB"
        row["licence"] = entry.licence if entry else str(config.get("recipe", {}).get("licence", "-"))
        rows.append(row | {"results": brief(config.get("results", {})) or (entry.note if entry else "") or "-"})
    return rows
