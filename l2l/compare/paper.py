"""``compare.md``: the tables of a comparison as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from l2l.compare.sheets import Sheet, Text


def markdown(title: str, said: Sequence[str], sheets: Sequence[Sheet]) -> str:
    """The page.

    Args:
        said: paragraphs between title and tables.
    """
    parts = [f"# {_escaped(title)}", *(_escaped(line) for line in said)]
    for sheet in sheets:
        parts += [f"## {_escaped(sheet.title)}", table(sheet), *([_escaped(sheet.note)] if sheet.note else [])]
    return "\n\n".join(parts) + "\n"


def table(sheet: Sheet) -> str:
    """A table; the best of a column in bold."""
    lines = [
        [_escaped(name) for name in sheet.columns],
        ["---", *["--:"] * (len(sheet.columns) - 1)],
        *([_marked(text) for text in row] for row in sheet.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _marked(text: Text) -> str:
    return f"**{_escaped(text.text)}**" if text.best else _escaped(text.text)


def _escaped(text: str) -> str:
    """Text that cannot end a table's field or become markup; what names hold is left as it reads."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in ("\\", "|", "*", "`"):
        plain = plain.replace(mark, f"\\{mark}")
    return plain
