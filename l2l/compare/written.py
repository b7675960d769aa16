"""``meta_evaluate.json``: strict JSON, whole, a line per run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from l2l.report.files import write_whole

LINES = ("runs",)
"""Lists whose entries take a line each."""


def write_verdict(target: Path, verdict: Mapping[str, Any]) -> Path:
    """Write a verdict. Numbers that are not finite (a run that diverged, a loss never reached) are written as null."""
    plain = finite(verdict)
    lines = {name: plain.pop(name) for name in LINES if name in plain}
    text = json.dumps(plain, indent=1, allow_nan=False)[:-2]
    for name, entries in lines.items():
        rows = ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in entries)
        text += f',\n "{name}": [\n{rows}\n ]'
    return write_whole(target, lambda path: path.write_text(text + "\n}\n"))


def finite(value: Any) -> Any:
    """The value as JSON has it, None in place of infinities and what is not a number."""
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
