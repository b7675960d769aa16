"""Writes what the methods declare (passes, memory, source, arguments) under their names in docs/methods.md.

python docs/site/methods_page.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from l2l.methods import method_class, method_names
from l2l.methods.registry import method_list
from l2l.methods.wrappers import AROUND, wrapper_class
from l2l.train.baselines import baseline_list

PAGE = Path(__file__).parents[1] / "methods.md"


def _kind(name: str) -> Any:
    """The class behind a row of `l2l methods list`; None for baselines that take no steps."""
    if AROUND in name:
        return wrapper_class(name.partition(AROUND)[0])
    return method_class(name) if name in method_names() else None


def _arguments(kind: Any) -> str:
    """Names of the constructor's arguments with their defaults; the method inside and the tuner are not among them."""
    found = [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.name != "inner"
    ]
    return ", ".join(f"`{argument}`" for argument in found)


def facts(row: dict[str, str]) -> str:
    """What stands under a method's name: one block quote."""
    kind = _kind(row["method"])
    lines = [row["what"]]
    if kind is not None:
        lines.append(f"{row['passes']} passes per step by default · keeps {row['memory']} · {row['paper']}")
        lines.append(f"Arguments: {_arguments(kind) or 'none'}")
    return "\n".join(f"> {line}  " if line != lines[-1] else f"> {line}" for line in lines)


def written(text: str) -> str:
    """The page with the facts of every method below its heading.

    Raises:
        ValueError: a method has no heading of its own, or a heading names no method.
    """
    rows = {row["method"]: row for row in method_list() + baseline_list()}
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    if sorted(headings) != sorted(rows):
        raise ValueError(f"{PAGE.name} and `l2l methods list` differ in {sorted(set(headings) ^ set(rows))}")

    def under(found: re.Match[str]) -> str:
        return f"### {found.group(1)}\n\n{facts(rows[found.group(1)])}\n\n"

    return re.sub(r"^### (.+)\n\n(?:(?:>.*\n)+\n)?", under, text, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
