"""``l2l tuners download``: a tuner by its name in a registry, or by hub id, into the cache; checked before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from l2l.tuners import store
from l2l.tuners.fetch import Report, fetch, progress_bar, sha256_of, silent
from l2l.tuners.hub import hub_folder
from l2l.tuners.registry import CHECKSUM, Entry, cache_folder, entries, find
from l2l.tuners.store import CONFIG, WEIGHTS


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
