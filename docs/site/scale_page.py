"""Writes the tables of scale.md that are arithmetic: what each means of fine-tuning takes, and on which devices it fits.

``python docs/site/scale_page.py`` puts them between their marks; tests/test_docs.py holds the page to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from l2l import costs
from l2l.models.shapes import SHAPES, shape_config
from l2l.tools import devices

PAGE = Path(__file__).parents[1] / "scale.md"
MODELS = [name for name in SHAPES if name != "opt-tiny-shape"]
LOAD = costs.Load(rows=8, length=512, read=8)
MARK = "<!-- {}: written by docs/site/scale_page.py -->"


def needs(models: Sequence[str] = MODELS) -> dict[str, dict[str, int]]:
    """Bytes of each means, by model."""
    return {name: devices.needs_of(shape_config(name), LOAD) for name in models}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _short(name: str) -> str:
    return name.removesuffix("-shape")


def tables(found: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """The tables by their marks."""
    columns = [f"{memory} GB" for memory in devices.DEVICES]
    chosen = {name: devices.choices(own) for name, own in found.items()}
    fits = [[_short(name), *("<br>".join(chosen[name][column]) for column in columns)] for name in found]
    takes = [
        [means, *(f"{own[means] / 1e9:.2f}" if means in own else "-" for own in found.values())] for means in devices.MEANS
    ]
    return {
        "fits": _table(["model", *columns], fits),
        "takes": _table(["GB", *map(_short, found)], takes),
    }


def written(text: str, found: Mapping[str, Mapping[str, int]]) -> str:
    """The page with its tables.

    Raises:
        ValueError: a table has no mark in it.
    """
    for name, table in tables(found).items():
        mark = re.escape(MARK.format(name))
        text, count = re.subn(rf"({mark}\n\n)(?:\|.*\n)*", lambda place, table=table: f"{place.group(1)}{table}\n", text)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table {name!r}: it needs one")
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), needs()))
