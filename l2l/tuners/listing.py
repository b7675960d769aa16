"""``l2l tuners list``: which tuners there are, and whether they are here."""

from __future__ import annotations

import json
from pathlib import Path

from l2l.tuners import store
from l2l.tuners.download import ready
from l2l.tuners.registry import Entry, entries
from l2l.tuners.results import brief


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
