"""Names of tuners and where each lies: the package's own list, and those of its users. Nothing here opens a connection.

A registry is JSON: ``{"registry_version": 1, "tuners": {name: entry}}``; an entry has the fields of :class:`Entry`.

One file over HTTP: continued where it broke off, checked by its sha256, complete before it takes its name.

Tuners on the Hugging Face hub: config and safetensors only. A pickle is never fetched.

``l2l tuners download``: a tuner by its name in a registry, or by hub id, into the cache; checked before it is used.

``l2l tuners list``: which tuners there are, and whether they are here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from http.client import HTTPException, HTTPResponse
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from l2l.tuners import io as store
from l2l.tuners.card import brief
from l2l.tuners.io import CONFIG, WEIGHTS
from l2l.tuners.model import Tuner

VERSION = 1
OWN = Path(__file__).with_name("registry.json")
VARIABLE = "L2L_REGISTRY"
"""Environment variable: path of a further registry, in place of ``~/.config/l2l/registry.json``."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
ADDRESS = re.compile(r"https?://[^\s/]+/\S+")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CHECKSUM = re.compile(r"[0-9a-f]{64}")
Format = Literal["l2l", "published"]


@dataclass(frozen=True)
class Entry:
    """Where a tuner lies, and what is to be found there.

    Raises:
        ValueError: a field does not say what it should.
    """

    name: str
    sha256: str
    """Of ``tuner.safetensors``, or of the published file."""
    base_model: str
    licence: str
    """SPDX name, or ``unknown``."""
    format: Format = "l2l"
    """``published``: a file as the paper's authors published it, which is imported."""
    url: str | None = None
    """Address of a published file, or of the folder that an l2l tuner lies in."""
    hub: str | None = None
    """Or the id of a hub repository."""
    bundled: str | None = None
    """Or the folder among those that come with the project."""
    revision: str | None = None
    """Commit; pinned for everything that is fetched from a hub."""
    config_sha256: str | None = None
    """Of ``config.json``; needed for an l2l tuner at a url."""
    size: int | None = None
    """Bytes of the file that ``sha256`` is of; more are never fetched."""
    blocks: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for field, (fits, rule) in self._rules().items():
            if not fits:
                raise ValueError(
                    f"registry entry {self.name!r}: {field} is {getattr(self, field, None)!r}; it must {rule}"
                )

    def _rules(self) -> dict[str, tuple[bool, str]]:
        sources = [value for value in (self.url, self.hub, self.bundled) if value is not None]
        lone = self.format == "published" or self.url is None
        return {
            "name": (_fits(NAME, self.name), "begin with a letter or digit; -, _ and . may follow"),
            "format": (self.format in get_args(Format), "be l2l or published"),
            "source": (len(sources) == 1, "be exactly one of url, hub and bundled"),
            "hub": (self.hub is None or _fits(HUB_ID, self.hub), "look like user/name"),
            "bundled": (self.bundled is None or _fits(NAME, self.bundled), "name a bundled folder"),
            "revision": (
                isinstance(self.revision, str) or (self.revision is None and self.hub is None),
                "pin the commit of a hub repository",
            ),
            "sha256": (_fits(CHECKSUM, self.sha256), "be 64 hexadecimal digits"),
            "config_sha256": (
                lone if self.config_sha256 is None else _fits(CHECKSUM, self.config_sha256),
                "be 64 hexadecimal digits, and be there for an l2l tuner at a url",
            ),
            "base_model": (isinstance(self.base_model, str), "be a string"),
            "licence": (isinstance(self.licence, str), "be a string"),
            "size": (self.size is None or _whole(self.size), "be a whole number of bytes"),
            "blocks": (self.blocks is None or _whole(self.blocks), "be a whole number"),
            "note": (isinstance(self.note, str), "be a string"),
            "url": (
                self.format != "published" if self.url is None else _fits(ADDRESS, self.url),
                "begin with http[s]://",
            ),
        }


def _fits(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def user_registry() -> Path:
    """Where a user's own registry lies, if there is one."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path.home() / ".config" / "l2l" / "registry.json"


def entries() -> dict[str, Entry]:
    """All entries by name: those of the package, then those of the user, who may replace them.

    Raises:
        FileNotFoundError: the environment names a registry that is not there.
        ValueError: a registry is not readable, or an entry does not fit.
    """
    own, found = user_registry(), read(OWN)
    if not own.is_file():
        if os.environ.get(VARIABLE):
            raise FileNotFoundError(f"{VARIABLE} names {str(own)!r}, which is no file: correct it, or unset it")
        return found
    return found | read(own)


def read(path: Path) -> dict[str, Entry]:
    """The entries of one registry.

    Raises:
        ValueError: it is not readable, or an entry does not fit.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable registry of tuners ({error}): mend or remove it") from error
    if not isinstance(value, dict) or value.get("registry_version") != VERSION:
        raise ValueError(f"{path} is not a registry of version {VERSION}: its 'registry_version' says otherwise")
    found = value.get("tuners")
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f"{path} has no table of 'tuners': each name needs an entry")
    return {name: _entry(path, name, entry) for name, entry in found.items()}


def _entry(path: Path, name: str, values: Mapping[str, Any]) -> Entry:
    known = {field.name: field.default is MISSING for field in fields(Entry) if field.name != "name"}
    unknown = sorted(set(values) - set(known))
    lacking = [field for field, needed in known.items() if needed and field not in values]
    if unknown or lacking:
        what = f"has no field {unknown[0]!r}" if unknown else f"lacks {lacking[0]!r}"
        raise ValueError(f"{path}: an entry {what} ({name!r}); the fields are {', '.join(known)}")
    return Entry(name, **values)


def find(name: str) -> Entry | None:
    """The entry of that name; None where there is none. ``l2l/tiny`` finds ``l2l-tiny``."""
    found = entries()
    return found.get(name) or found.get(name.replace("/", "-"))


def cache_folder() -> Path:
    """Where downloaded tuners are kept: ``L2L_CACHE``, or ``~/.cache/l2l``; below it one folder per name."""
    given = os.environ.get("L2L_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "l2l") / "tuners"


def entry_of(directory: Path, licence: str) -> dict[str, Any]:
    """What a registry would say of a bundled tuner in this directory."""
    from hashlib import sha256

    config, weights = json.loads((directory / "config.json").read_text()), directory / "tuner.safetensors"
    return {
        "bundled": directory.name,
        "revision": config["revision"],
        "sha256": sha256(weights.read_bytes()).hexdigest(),
        "size": weights.stat().st_size,
        "base_model": config["base_model"],
        "blocks": len(config["blocks"]),
        "licence": licence,
        "format": "l2l",
    }


PIECE = 1 << 16
PATIENCE = 30.0
"""Seconds without a byte after which a connection is given up."""
ATTEMPTS = 5
"""Connections in a row that break off without a byte more."""

Report: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes that are there, and with how many there will be, if that is known."""


def silent(have: int, total: int | None) -> None:
    """Report nothing."""


def sha256_of(path: Path) -> str:
    """Of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, target: Path, sha256: str, size: int | None = None, report: Report = silent) -> Path:
    """The file at ``url`` as ``target``; what is there already, whole or in part, is used.

    A transfer that breaks off is continued, in this call and in the next one, where the server can do so; else it begins
    again. A part that turns out to belong to another file is thrown away, once.

    Args:
        size: more bytes than this are refused.

    Raises:
        FileNotFoundError: the server cannot be reached, has no such file, or broke off again and again.
        ValueError: the file is not the one that the checksum is of; it is removed.
    """
    if target.is_file() and sha256_of(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target, sha256)
    continued = part.exists()
    if continued and sha256_of(part) == sha256:  # interrupted between the last byte and the name
        return part.replace(target)
    _receive(url, part, size, report)
    if sha256_of(part) != sha256 and continued:
        part.unlink()
        _receive(url, part, size, report)
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise ValueError(
            f"{url} has sha256 {found}, but {sha256} was asked for: the file is not the one that was checked, and was "
            "removed"
        )
    return part.replace(target)


def part_of(target: Path, sha256: str) -> Path:
    """Where a file is collected: its name says what it is to become."""
    return target.with_name(f".{target.name}.{sha256[:12]}.part")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _receive(url: str, part: Path, size: int | None, report: Report) -> None:
    """Collect until everything is there."""
    fruitless = 0
    while fruitless < ATTEMPTS:
        before = _length(part)
        if _transfer(url, part, size, report):
            return
        fruitless = 0 if _length(part) > before else fruitless + 1
    raise FileNotFoundError(
        f"{url} broke off {ATTEMPTS} times in a row; {_length(part)} bytes are kept: run the same command again later"
    )


def _transfer(url: str, part: Path, size: int | None, report: Report) -> bool:
    """One connection; whether everything is there after it."""
    with _open(url, _length(part)) as response:
        have = _begin(response, _length(part))
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with part.open("ab" if have else "wb") as file:
            while piece := _read(response):
                have += len(piece)
                if size is not None and max(have, total or 0) > size:
                    break
                file.write(piece)
                report(have, total)
    if size is not None and max(have, total or 0) > size:
        part.unlink()
        raise ValueError(f"{url} gives more than the {size} bytes that the file has: it is another, and was removed")
    return piece is not None and (total is None or have >= total)


def _read(response: HTTPResponse) -> bytes | None:
    """The next piece; empty at the end, None where the connection broke off."""
    try:
        return response.read(PIECE)
    except (OSError, HTTPException):
        return None


def _begin(response: HTTPResponse, have: int) -> int:
    """How many of the bytes that are there the server goes on from; 0 where it begins again."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return have if response.status == 206 and found and int(found[1]) == have else 0


def _open(url: str, have: int) -> HTTPResponse:
    headers = {"Accept-Encoding": "identity", "User-Agent": "l2l"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=PATIENCE)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # more is there than the server has
            return _open(url, 0)
        raise FileNotFoundError(f"{url} is not to be had: the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise FileNotFoundError(
            f"{url} cannot be reached ({reason}): run the command where there is a network and copy the folder that it "
            "prints, or give the directory of a tuner"
        ) from error


@contextmanager
def progress_bar(label: str, visible: bool = True) -> Iterator[Report]:
    """A bar in bytes, from the first report on; what it yields is a :data:`Report`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), disable=not visible)

    def report(have: int, total: int | None) -> None:
        if not bar.tasks:
            bar.add_task(label, total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=have, total=total)

    try:
        yield report
    finally:
        if bar.tasks:
            bar.stop()


PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt")
UNKNOWN = "unknown"


def hub_folder(repo_id: str, revision: str | None) -> Path:
    """A folder with a hub tuner's weights and config: from the cache, else downloaded into it.

    Raises:
        FileNotFoundError: there is no such tuner, or the hub cannot be reached.
        ValueError: the repository holds a pickle in place of a tuner.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with _without_retries_told():
            files = [Path(hf_hub_download(repo_id, name, revision=revision)) for name in (CONFIG, WEIGHTS)]
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"tuner {repo_id!r} is not in the local cache and the hub cannot be reached: run `l2l tuners download "
            f"{repo_id}` where there is a network, or give a directory"
        ) from error
    except (EntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError):
            _refuse_pickles(repo_id, revision)
        raise FileNotFoundError(f"no tuner {repo_id!r} on the hub: {str(error).splitlines()[0]}") from error
    return files[1].parent


@contextmanager
def _without_retries_told() -> Iterator[None]:
    """The hub's client says of each try that it failed, in two lines; our error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_pickles(repo_id: str, revision: str | None) -> None:
    """Raise ValueError where a repository without a tuner holds a pickle of one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = sorted(name for name in HfApi().list_repo_files(repo_id, revision=revision) if name.endswith(PICKLES))
    except HfHubHTTPError:
        return
    if found:
        raise ValueError(
            f"the hub repository {repo_id!r} holds no tuner.safetensors, but the pickle {found[0]!r}, which could run "
            f"code: it is not loaded. Get it with `hf download {repo_id} {found[0]}`, then `l2l tuners import FILE "
            "--base-model ID --out DIR` reads its numbers without executing anything"
        )


def licensed(tuner: Tuner, licence: str | None) -> Tuner:
    """The tuner with a licence in its recipe, as the card states it.

    Raises:
        ValueError: the tuner's licence is unknown and none is given: it is not ours to pass on.
    """
    stated = tuner.provenance.recipe.get("licence")
    if licence is None:
        if isinstance(stated, str) and stated.startswith(UNKNOWN):
            raise ValueError(
                f"the licence of this tuner is {stated}: it is not pushed. With its authors' leave, name the licence with "
                "--licence"
            )
        return tuner
    recipe = tuner.provenance.recipe | {"licence": licence}
    provenance = replace(tuner.provenance, recipe=recipe)
    known = (tuner.normalizer, tuner.architecture, tuner.architecture_args, provenance, tuner.feature_set)
    return Tuner(tuner.network, tuner.fingerprint, *known, tuner.basis, tuner.block_schedule)


def _check_public(tuner: Tuner) -> None:
    base = tuner.provenance.base_model
    if Path(base).is_absolute() or base.startswith("."):
        raise ValueError(
            f"the tuner says that its model is {base!r}, a directory that others do not have: name the model with "
            "`l2l tuners card DIR --base_model ID` before it is pushed"
        )


def push(tuner: Tuner, repo_id: str, private: bool, revision: str | None, licence: str | None = None) -> str:
    """Upload a tuner's three files in one commit; gives the commit's address. Needs a logged-in hub account.

    Raises:
        ValueError: the licence is unknown, the hub refuses or cannot be reached, or the base model is a directory.
    """
    import tempfile

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable = import_module("huggingface_hub.errors").HTTPError  # of its HTTP client, whichever that is
    tuner = licensed(tuner, licence)
    _check_public(tuner)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        tuner.save_pretrained(folder)
        try:
            with _without_retries_told():
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision).commit_url)
        except (HfHubHTTPError, HFValidationError, RuntimeError) as error:  # RuntimeError: an upload broke off
            raise ValueError(
                f"the hub did not take {repo_id!r} ({_first_line(error)}): log in with `hf auth login`, and name "
                "a repository that is yours"
            ) from error
        except (unreachable, ConnectionError) as error:  # ConnectionError: HF_HUB_OFFLINE is set
            raise ValueError(
                f"the hub cannot be reached ({_first_line(error)}), so nothing was pushed: run the command where there is a "
                "network"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class DownloadConfig:
    """Download a tuner, so that it can be used by its name, also offline."""

    tuner: str
    """Name in a registry (see ``l2l tuners list``), or hub id."""
    revision: str | None = None
    """Commit, branch or tag of a hub tuner; None: its main branch. Registries pin their own."""
    sha256: str | None = None
    """What the hub's ``tuner.safetensors`` must have."""
    progress: bool = True
    """Show a progress bar."""


def run_download(config: DownloadConfig) -> Path:
    """Download what the configuration names; the directory it lies in. See :func:`download`."""
    with progress_bar(config.tuner, config.progress) as report:
        return download(config.tuner, config.revision, config.sha256, report)


def download(name: str, revision: str | None = None, sha256: str | None = None, report: Report = silent) -> Path:
    """A directory that holds the tuner. What is in the cache is not fetched again.

    A published file is imported: its numbers are kept, nothing in it is executed.

    Raises:
        FileNotFoundError: there is none of that name, or it cannot be reached; what to do is said.
        ValueError: it is not what its checksum says; it is removed.
    """
    if sha256 is not None and not CHECKSUM.fullmatch(sha256):
        raise ValueError(f"sha256 is {sha256!r}; it must be 64 hexadecimal digits")
    entry = find(name)
    if entry is not None:
        if revision not in (None, entry.revision) or sha256 not in (None, entry.sha256):
            raise ValueError(f"the registry pins {name!r} to {entry.revision}, sha256 {entry.sha256}: leave yours out")
        return ready(entry) or _obtain(entry, report)
    if name.count("/") != 1:
        raise FileNotFoundError(f"no tuner {name!r}: it is in no registry ({', '.join(entries())}), and not a hub id")
    found = hub_folder(name, revision)
    if sha256 is not None:
        _check(found / WEIGHTS, sha256)
    return found


def ready(entry: Entry) -> Path | None:
    """Where the tuner of an entry lies already; None: it has to be downloaded."""
    if entry.bundled is not None:
        folder = store.bundled_folder() / entry.bundled
    elif entry.hub is not None:
        from huggingface_hub import try_to_load_from_cache

        files = [try_to_load_from_cache(entry.hub, name, revision=entry.revision) for name in (WEIGHTS, CONFIG)]
        return Path(files[0]).parent if isinstance(files[0], str) and isinstance(files[1], str) else None
    else:
        folder = _folder(entry)
    return folder if (folder / CONFIG).is_file() else None


def located(name: str) -> Path | None:
    """Where the tuner of that name in a registry lies; None: no registry has the name.

    Raises:
        FileNotFoundError: it is known, but not here yet.
    """
    entry = find(name)
    if entry is None:
        return None
    found = ready(entry)
    if found is None:
        raise FileNotFoundError(f"tuner {name!r} is known, but not here yet: run `l2l tuners download {name}`")
    return found


def _folder(entry: Entry) -> Path:
    """In the cache. The checksum in its name keeps what a registry meant before from being taken for what it means now."""
    return cache_folder() / f"{entry.name}-{entry.sha256[:12]}"


def _obtain(entry: Entry, report: Report) -> Path:
    if entry.hub is not None:
        found = hub_folder(entry.hub, entry.revision)
        _check(found / WEIGHTS, entry.sha256)
        return found
    if entry.url is None:
        raise FileNotFoundError(
            f"the bundled tuner {entry.name!r} is not in {store.bundled_folder()}: install l2l again"
        )
    return _import(entry, entry.url, report) if entry.format == "published" else _collect(entry, entry.url, report)


def _import(entry: Entry, url: str, report: Report) -> Path:
    """Fetch a published file and import it."""
    folder = _folder(entry)
    file = cache_folder() / "downloads" / f"{entry.sha256[:12]}-{url.rpartition('/')[2]}"
    fetch(url, file, entry.sha256, entry.size, report)
    import_module("l2l.tuners.published").import_published(file, entry.base_model, folder)
    file.unlink()
    return folder


def _collect(entry: Entry, url: str, report: Report) -> Path:
    """Fetch an l2l tuner file by file; the folder takes its name when all are there."""
    folder = _folder(entry)
    parts = cache_folder() / "downloads" / folder.name
    fetch(f"{url.rstrip('/')}/{CONFIG}", parts / CONFIG, entry.config_sha256 or "", report=report)
    fetch(f"{url.rstrip('/')}/{WEIGHTS}", parts / WEIGHTS, entry.sha256, entry.size, report)
    return parts.replace(folder)


def _check(file: Path, sha256: str) -> None:
    found = sha256_of(file)
    if found != sha256:
        file.resolve().unlink()  # in the hub's cache it is a link
        file.unlink(missing_ok=True)
        raise ValueError(f"{file.name} has sha256 {found}, but {sha256} was asked for: it was removed")


def rows() -> list[dict[str, str]]:
    """A row per tuner that is bundled or in a registry: name, where it is, base model, blocks, size, licence, results.

    Nothing is downloaded and no weights are read.

    Raises:
        ValueError: a registry is not readable.
    """
    known = entries()
    loose = [path.parent for path in sorted(store.bundled_folder().glob(f"*/{store.CONFIG}"))]
    found = [_row(name, "bundled", folder, None) for folder in loose if (name := folder.name) not in known]
    return [*(_registered(entry) for entry in known.values()), *found]


def _registered(entry: Entry) -> dict[str, str]:
    folder = ready(entry)
    here = "remote" if folder is None else "bundled" if entry.bundled else "cached"
    return _row(entry.name, here, folder, entry)


def _row(name: str, here: str, folder: Path | None, entry: Entry | None) -> dict[str, str]:
    config = json.loads((folder / store.CONFIG).read_text()) if folder else {}
    size = (folder / store.WEIGHTS).stat().st_size if folder else entry.size if entry else None
    blocks = len(config["blocks"]) if config else entry.blocks if entry else None
    recipe = config.get("recipe", {})
    return {
        "name": name,
        "where": here,
        "base model": entry.base_model if entry else config["base_model"],
        "blocks": "-" if blocks is None else str(blocks),
        "size": "-" if size is None else sized(size),
        "licence": entry.licence if entry else str(recipe.get("licence", "-")),
        "results": brief(config.get("results", {})) or (entry.note if entry else "") or "-",
    }


def sized(size: int) -> str:
    """A number of bytes in the unit that keeps it short."""
    if size < 1024:
        return f"{size} B"
    return f"{size / 1024:.0f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"
