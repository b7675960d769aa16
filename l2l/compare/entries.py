"""Who takes part in a setting, with everything decided but the learning rate; and tuners as they were on the day."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2l.compare.config import Contender
from l2l.compare.protocol import Point
from l2l.report.files import UNFINISHED
from l2l.tuners.store import CONFIG, WEIGHTS
from l2l.tuners.tuner import Tuner

ABOUT = {"base_model", "revision", "recipe", "results", "versions", "fingerprint"}
"""What a tuner's config says about it, beside what it is."""


@dataclass(frozen=True)
class Entry:
    """A contender in one setting."""

    label: str
    role: str
    method: str
    tuners: Mapping[str, str | None]
    """Task -> directory of the tuner; the same one for all tasks, save for an oracle's."""
    method_args: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    alternatives: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def of(contender: Contender, tuner: str | None, tasks: Sequence[str]) -> Entry:
        """A contender of the configuration, with its tuner."""
        given = contender.method_args, contender.options, tuple(contender.alternatives)
        return Entry(contender.label, contender.role, contender.method, dict.fromkeys(tasks, tuner), *given)

    def points(self, grid: Sequence[float], beta_grid: Sequence[float]) -> list[Point]:
        """What its learning rate is chosen among: the same values for all, small ones first."""
        found: list[Point] = []
        for alternative in self.alternatives or ({},):
            auto = (self.options | dict(alternative)).get("lr") == "auto"
            for value in sorted(beta_grid if auto else grid):
                found.append(dict(alternative) | ({"lr": "auto", "beta": value} if auto else {"lr": value}))
        return found


def freeze(tuner: Tuner, folder: Path) -> Path:
    """Save a tuner below ``folder`` under a name that its content gives; nothing is written where it lies there already.

    So a run says by its tuner's path what it used, and a tuner that is learned anew is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
        saved = tuner.save_pretrained(Path(temporary) / "tuner")
        target = folder / fingerprint(saved)
        if not target.exists():
            saved.rename(target)
    return target


def fingerprint(directory: Path) -> str:
    """Hash of what a saved tuner is, whatever its card says about it."""
    config = json.loads((directory / CONFIG).read_text())
    kept = {name: value for name, value in config.items() if name not in ABOUT}
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    for path in sorted(directory.glob("*" + Path(WEIGHTS).suffix)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
